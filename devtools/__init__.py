"""Tools for developers, none of which the pack itself uses; `dev.py` starts them.

Rooms, each of which imports only itself and those before it: `host` (ComfyUI's environment, its server, a browser), `files`
(writers of model files), `workflows` (the examples), `measure` (speed, memory, sizes, quality).
"""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
