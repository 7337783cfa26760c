"""Synthetic CT of the skull base, for the demonstration and the tests."""
