"""Saves models as files of packed weights: `planning` chooses types, `calibration` measures."""
