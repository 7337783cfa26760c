"""`mae3d_split`: cross-validation folds and test sets that keep the cases of a patient together."""
