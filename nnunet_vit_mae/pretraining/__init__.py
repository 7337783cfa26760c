"""The masked autoencoding loop: preprocessed volumes to crops to steps to an encoder."""

NOT_STARTED = "What was saved before is kept, and the same command starts again."  # until there is a state
