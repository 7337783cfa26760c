"""The masked autoencoding loop: preprocessed volumes to crops to steps to an encoder."""
