"""LoRAs: read from a file, checked against a model before anything runs, and applied through the
host's own patchers."""
