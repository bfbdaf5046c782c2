"""Packs a weight: the method for its type, and the errors that are made up for."""
