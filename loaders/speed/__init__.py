"""Measures how fast a loaded model's steps are, in each of the ways to compute them."""
