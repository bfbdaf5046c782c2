"""Tools for developers, none of which the pack itself uses; `dev.py` starts them.

Rooms, each of which imports only itself and those before it: `host` (ComfyUI's environment, its
server, a browser), `fakegpu` (GPUs that are memory of the host, to test on), `files` (writers of
model files), `workflows` (the examples), `measure` (speed, memory, sizes, quality), `fuzz` (bad
files by the hundred thousand), `gpu` (what only a GPU can show, in one command), `soak` (a server
for hours, in one). `limited_cpu` runs a command on this CPU without some of its instruction sets.
"""
import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def product_module(name: str):
    """Imports a module of the pack, such as `ops.quantize`, also where there is no host."""
    if "featherweight" not in sys.modules:
        sys.modules["featherweight"] = types.ModuleType("featherweight")
        sys.modules["featherweight"].__path__ = [str(ROOT)]
    return importlib.import_module(f"featherweight.{name}")
