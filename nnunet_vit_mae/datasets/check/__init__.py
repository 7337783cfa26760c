"""`mae3d_check`: find problems of a raw dataset, within each case and between cases."""
