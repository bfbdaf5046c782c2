"""The ComfyUI extension: finds the nodes in the files of this folder.

A node file defines classes that derive directly from `io.ComfyNode`. One that needs what this host lacks is left out, as the
pack's `__init__.py` has said in the log; so is one that fails to import or to state its schema, which is named in the log. The
others load. Ids that do not begin with "Featherweight" belong to packs that shared workflows were made with: they are left out
while somebody else holds them.
"""
import importlib
import logging
import pkgutil
import re

import comfy.model_management
import nodes as host_nodes
from comfy_api.latest import ComfyExtension, io

from .. import host_contract
from ..loaders.folders import Replacements, register_folders
from ..ops.kernels import background
from . import help_pages
from .elsewhere import watch_prompts

log = logging.getLogger(__name__)

OWN_PREFIX = "Featherweight"
PICKERS = re.compile(r".*_name\d?|text_encoder_\d|mmproj|sensitivity")  # ids of inputs that name a file or a folder
REPLACEMENTS = Replacements()  # as long as this ComfyUI, whose cache of what nodes gave it is for


class FeatherweightExtension(ComfyExtension):
    async def on_load(self):
        register_folders()
        watch_prompts()
        background.raise_if_cancelled = comfy.model_management.throw_exception_if_processing_interrupted

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        found, left_out = [], host_contract.left_out(host_contract.changes())
        for module in pkgutil.iter_modules(__path__):
            if module.name in left_out:
                continue
            try:
                found += find_nodes(importlib.import_module(f"{__name__}.{module.name}"))
            except Exception:
                log.exception("[Featherweight] nodes/%s.py could not be loaded; its nodes are missing.", module.name)
        found = [node for node in found if not taken(node.GET_SCHEMA().node_id)]
        help_pages.serve(found)
        return found


def find_nodes(module) -> list[type[io.ComfyNode]]:
    """Node classes a module defines, each with a schema that can be stated."""
    found = [value for value in vars(module).values()
             if isinstance(value, type) and issubclass(value, io.ComfyNode) and value.__module__ == module.__name__]
    for node in found:
        node.GET_SCHEMA()
        node.fingerprint_inputs = classmethod(_replaced)
    return found


def _replaced(cls, **inputs) -> int:
    """What the host compares to know whether a node has to run again: its files may have become others of the same names."""
    return REPLACEMENTS.count(value for name, value in inputs.items() if PICKERS.fullmatch(name))


def taken(node_id: str) -> bool:
    """Whether another pack holds a legacy id already. Displacing its class would break packs that call it."""
    if node_id.startswith(OWN_PREFIX) or node_id not in host_nodes.NODE_CLASS_MAPPINGS:
        return False
    log.info("[Featherweight] %s is provided by another node pack and stays with it.", node_id)
    return True
