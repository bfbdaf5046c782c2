"""Runs a model to measure what packing its layers costs."""
