"""Files to packed tensors to host models."""
