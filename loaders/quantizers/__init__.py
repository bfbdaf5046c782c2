"""How quantisers store weights: their names, settings and layouts."""
