"""`mae3d_check`: what is wrong with a raw dataset, within each case and across cases."""
