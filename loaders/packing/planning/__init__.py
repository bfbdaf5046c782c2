"""Which type each tensor of a model takes."""
