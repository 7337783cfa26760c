"""Images as files: volumes and their geometry, labels, DICOM, registration, and how nnU-Net names channels."""
