"""Encoders that other projects have pre-trained, converted into ours."""
