"""Image files: volumes and their geometry, labels, DICOM series, registration, and nnU-Net's file names."""
