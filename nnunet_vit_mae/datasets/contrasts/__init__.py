"""`mae3d_fill_contrasts`: images of zeros for contrasts that were not acquired, and a record of which are real."""
