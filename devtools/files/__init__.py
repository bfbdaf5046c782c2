"""Model files as people have them, for tests, demo and bench: who writes them, and the tensors of
small models."""
