"""Turns floats into the bytes of a format: search for scales, error feedback, choice of method."""
