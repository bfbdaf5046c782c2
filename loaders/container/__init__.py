"""The base class of weight files, their errors, and reading from network drives."""
