"""Packs weights: the method for each type, error feedback, and the error that is left."""
