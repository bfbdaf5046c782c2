"""Featherweight: quantised diffusion models in ComfyUI, weights kept packed in memory."""
import logging
import re

from comfyui_version import __version__ as host_version

from . import host_contract

WEB_DIRECTORY = "./nodes/web"
OLDEST_HOST = "0.24.0"  # of those that `dev.py matrix` runs


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


if _numbers(host_version) < _numbers(OLDEST_HOST):
    logging.error("[Featherweight] This is ComfyUI %s and Featherweight needs %s or newer: update ComfyUI. Until then"
                  " none of its nodes are there.", host_version, OLDEST_HOST)
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
    return FeatherweightExtension()
