"""From a hospital's folder to an nnU-Net raw dataset that can be trained on."""
