"""What runs of a model say about packing it."""
