"""`mae3d_convert`: convert DICOM or BIDS to a raw dataset."""
