"""Chooses the type of each tensor of a model."""
