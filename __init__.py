"""Featherweight: quantised diffusion models in ComfyUI, weights kept packed in memory."""
import logging
import re
import sys
from pathlib import Path

from . import host_contract

try:
    from comfyui_version import __version__ as host_version
except ImportError:  # the oldest do not say
    host_version = "of an unknown version"

WEB_DIRECTORY = "./nodes/web"
OLDEST_HOST = "0.24.0"  # of those that `dev.py matrix` runs
IN_USE = "_featherweight_in_use"  # the name in sys.modules of the copy of this pack whose nodes the host has


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _obstacle() -> str | None:
    """Why the host gets no nodes from here, as one sentence."""
    if _numbers(host_version) < _numbers(OLDEST_HOST):
        return (f"This is ComfyUI {host_version} and Featherweight needs {OLDEST_HOST} or newer: update ComfyUI. Until then"
                " none of its nodes are there.")
    other = sys.modules.get(IN_USE)
    if other is not None and other.__name__ != __name__:
        used, unused = Path(other.__file__).parent, Path(__file__).parent
        return f"Featherweight is installed twice: the nodes of {used} are in use, so remove the other folder, {unused}."
    return None


_found = _obstacle()
if _found:
    logging.error("[Featherweight] %s", _found)
    NODE_CLASS_MAPPINGS = {}  # with it the host asks for no nodes in the way below
else:
    _changed = host_contract.changes()
    for _sentence in host_contract.sentences(_changed, host_version):
        logging.error("[Featherweight] %s", _sentence)
    _left_out = host_contract.left_out(_changed)
    if _left_out and len(_left_out) == len(host_contract.node_files()):
        NODE_CLASS_MAPPINGS = {}


async def comfy_entrypoint():
    from .nodes import FeatherweightExtension

    sys.modules[IN_USE] = sys.modules[__name__]
    return FeatherweightExtension()
