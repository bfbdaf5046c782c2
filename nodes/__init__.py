"""The ComfyUI extension: the nodes of the files of this folder and of `legacy`, each of which has a
line in `import_file`.

A node file defines classes that derive directly from `io.ComfyNode`, or makes them of a table. One
that fails to import or to state its schema, as on a host that lacks what it needs, is left out and
named in the log. The others load. Ids that do not begin with "Featherweight" belong to packs that
shared workflows were made with: they are left out while somebody else holds them.
"""
import logging
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import comfy.model_management
from comfy_api.latest import ComfyExtension, io

import nodes as host_nodes

from ..loaders.devices import gpus
from ..loaders.folders import FileVersions, register_folders
from ..ops.kernels import background, start_trials
from . import help_pages
from .host_server import log_lack
from .remote_prompts import watch_prompts

log = logging.getLogger(__name__)

OWN_PREFIX = "Featherweight"
# ids of inputs that name a file or a folder
PICKERS = re.compile(r".*_name\d?|text_encoder_\d|mmproj|sensitivity")
REPLACEMENTS = FileVersions()  # as long as this ComfyUI, whose cache of what nodes gave it is for


class FeatherweightExtension(ComfyExtension):
    async def on_load(self):
        register_folders()
        watch_prompts()
        background.raise_if_cancelled = (
            comfy.model_management.throw_exception_if_processing_interrupted
        )
        start_trials(gpus())

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        found, left_out = [], {}
        for name in file_names():
            file = name.replace(".", "/")
            try:
                found += find_nodes(import_file(name))
            except (ImportError, AttributeError, TypeError) as error:  # what a changed host gives
                log.debug("[Featherweight] nodes/%s.py could not be loaded.", file, exc_info=True)
                left_out.setdefault(str(error), []).append(re.sub(r"\W|_", " ", name))
            except Exception:
                log.exception(
                    "[Featherweight] nodes/%s.py could not be loaded; its nodes are missing.", file
                )
        for error, names in left_out.items():
            log_lack(error, f"these nodes are left out: {', '.join(names)}")
        found = [node for node in found if not taken(node.GET_SCHEMA().node_id)]
        help_pages.serve(found)
        return found


def file_names() -> list[str]:
    """The modules in this folder and in `legacy`, in the order in which the host gets their
    nodes."""
    legacy = [str(Path(folder) / "legacy") for folder in __path__]
    return sorted(
        file.name
        for file in (*pkgutil.iter_modules(__path__), *pkgutil.iter_modules(legacy, "legacy."))
    )


def import_file(name: str) -> ModuleType | None:
    """The module of a file with nodes, None for one without. What runs is written here, not looked
    up by the name of a file."""
    match name:
        case "apply_lora":
            from . import apply_lora as module
        case "check_lora":
            from . import check_lora as module
        case "inspect_model_file":
            from . import inspect_model_file as module
        case "legacy.calcuis":
            from .legacy import calcuis as module
        case "legacy.gguf":
            from .legacy import gguf as module
        case "legacy.kjnodes":
            from .legacy import kjnodes as module
        case "legacy.multigpu":
            from .legacy import multigpu as module
        case "legacy.nf4":
            from .legacy import nf4 as module
        case "load_checkpoint":
            from . import load_checkpoint as module
        case "load_diffusion_model":
            from . import load_diffusion_model as module
        case "load_text_encoder":
            from . import load_text_encoder as module
        case "measure_sensitivity":
            from . import measure_sensitivity as module
        case "place_model":
            from . import place_model as module
        case "place_text_encoder":
            from . import place_text_encoder as module
        case "run_on_ray":
            from . import run_on_ray as module
        case "save_packed_model":
            from . import save_packed_model as module
        case _:
            return None
    return module


def find_nodes(module: ModuleType | None) -> list[type[io.ComfyNode]]:
    """Node classes a module defines, or makes of a table, each with a schema that can be stated."""
    if module is None:
        return []
    found = [
        value
        for value in (*vars(module).values(), *getattr(module, "NODE_CLASS_MAPPINGS", {}).values())
        if isinstance(value, type)
        and issubclass(value, io.ComfyNode)
        and value.__module__ == module.__name__
    ]
    for node in found:
        node.GET_SCHEMA()
        if "fingerprint_inputs" not in vars(node):
            node.fingerprint_inputs = classmethod(_replaced)
    return found


def _replaced(cls, **inputs) -> int:
    """What the host compares to know whether a node has to run again: its files may have become
    others of the same names."""
    return REPLACEMENTS.count(value for name, value in inputs.items() if PICKERS.fullmatch(name))


def taken(node_id: str) -> bool:
    """Whether another pack holds a legacy id already. Displacing its class would break packs that
    call it."""
    if node_id.startswith(OWN_PREFIX) or node_id not in host_nodes.NODE_CLASS_MAPPINGS:
        return False
    log.info("[Featherweight] %s is provided by another node pack and stays with it.", node_id)
    return True
