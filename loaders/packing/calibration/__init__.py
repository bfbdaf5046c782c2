"""Runs a model to measure what packing its layers costs, and to pack them in sequence."""
