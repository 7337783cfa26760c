"""`mae3d_crop_roi`: a region drawn on a template, found in every scan by registration and cropped."""
