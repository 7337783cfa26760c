"""`mae3d_convert`: from DICOM or BIDS to a raw dataset."""
