"""Puts the real host on the path and this pack under the package name `featherweight`, for tests
and their child processes.

The pack's own `__init__.py` is not executed: it is what the host runs, and the server tests cover
it.
"""
import os
import sys
import types
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
HOST = Path(os.environ.get("COMFYUI_PATH", PACK / ".dev" / "host"))

if not (HOST / "comfy").is_dir():
    raise FileNotFoundError(
        f"No ComfyUI at {HOST}. Run `python3 dev.py test`, or set COMFYUI_PATH.")

sys.path.insert(0, str(HOST))
_arguments, sys.argv = sys.argv, ["main.py", *os.environ.get("HOST_ARGUMENTS", "--cpu").split()]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402  parses sys.argv once

sys.argv = _arguments
sys.path.insert(1, str(PACK))
import fake_gpus  # noqa: E402

if fake_gpus.ON_FAKE_GPUS:
    fake_gpus.start()

_pack = types.ModuleType("featherweight")
_pack.__path__ = [str(PACK)]
sys.modules["featherweight"] = _pack
from devtools.files import gguf_types  # noqa: E402, F401  gguf takes the types that are newer than it
