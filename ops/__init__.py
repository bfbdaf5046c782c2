"""Packed weights: their formats, layers, kernels, and the patcher that places them."""
