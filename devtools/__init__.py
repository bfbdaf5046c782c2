"""Tools for developers, none of which the pack itself uses; `dev.py` starts them."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
