"""nnU-Net plugin: a 3D vision transformer, pre-trained by masked autoencoding on one's own scans."""

__version__ = "0.1.0"
