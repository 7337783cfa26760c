"""`mae3d_split`: cross-validation folds and test sets in which no patient is on two sides."""
