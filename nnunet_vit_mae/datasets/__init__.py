"""Data sets made by this package: synthetic phantoms for the demonstration and the tests."""
