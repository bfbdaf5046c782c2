"""Featherweight: quantised diffusion models in ComfyUI, weights kept packed in memory."""
import logging
import re
import sys
from pathlib import Path

try:
    from comfyui_version import __version__ as host_version
except ImportError:  # the oldest versions do not have it
    host_version = "of an unknown version"

WEB_DIRECTORY = "./nodes/web"
OLDEST_HOST = "0.24.0"  # the oldest that `dev.py matrix` runs
# the name in sys.modules of the copy of this pack whose nodes ComfyUI uses
IN_USE = "_featherweight_in_use"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _obstacle() -> str | None:
    """Returns why ComfyUI gets no nodes from this copy, as a message, or None."""
    if _numbers(host_version) < _numbers(OLDEST_HOST):
        return (
            f"This is ComfyUI {host_version} and Featherweight needs {OLDEST_HOST} or newer:"
            " update ComfyUI. Until then none of its nodes are available.")
    other = sys.modules.get(IN_USE)
    if other is not None and other.__name__ != __name__:
        used, unused = Path(other.__file__).parent, Path(__file__).parent
        return (
            f"Featherweight is installed twice: the nodes of {used} are in use, so remove the other"
            f" folder, {unused}.")
    return None


_message = _obstacle()
if _message:
    logging.error("[Featherweight] %s", _message)
    NODE_CLASS_MAPPINGS = {}  # ComfyUI then does not call comfy_entrypoint


async def comfy_entrypoint():
    """Returns the extension that ComfyUI takes the nodes from. Raises ImportError."""
    try:
        from .nodes import FeatherweightExtension
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"ComfyUI {host_version} lacks what all nodes of Featherweight need ({error}). Update"
            " both, with the packages in their requirements.txt.") from error
    sys.modules[IN_USE] = sys.modules[__name__]
    return FeatherweightExtension()
