"""Saving models as files of packed weights: `planning` chooses the types, `calibration`
measures."""
