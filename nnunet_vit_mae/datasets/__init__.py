"""Everything before training: convert, crop, fill, check, split and refine raw datasets."""
