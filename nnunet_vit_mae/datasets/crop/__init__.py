"""`mae3d_crop_roi`: crop a region drawn on a template from every scan, located by registration."""
