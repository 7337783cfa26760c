"""The commands: parse, call one function, print what was written. Flags follow nnU-Net's."""
