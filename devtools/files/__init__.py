"""Writers of model files as people have them, for tests, demo and bench."""
