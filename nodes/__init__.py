"""The ComfyUI extension, which registers the nodes of this folder and of `legacy`.

A node file defines classes that derive directly from `io.ComfyNode`, or makes them from a table,
and has a line in `import_file`. A file that fails to import or to define its schema, for example on
a host that lacks something, is left out and named in the log; the others load. Ids that do not
begin with "Featherweight" belong to packs that shared workflows were made with. They are left out
while another pack has registered them.
"""
import functools
import pkgutil
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import comfy.model_management
from comfy_api.latest import ComfyExtension, io

import nodes as host_nodes

from ..loaders.container.weight_file import safe_repr
from ..loaders.paths.file_versions import FileVersions
from ..loaders.paths.folders import register_folders
from ..loaders.progress import Progress
from ..ops.kernels.waiting import host
from ..ops.log import log
from ..ops.patcher import PackedPatcher
from . import help_pages
from .comfyui_server import log_lack
from .node_text import keep_text
from .remote_prompts import watch_prompts
from .unused_patches import show_unused_patches

OWN_PREFIX = "Featherweight"
# ids of inputs that name a file or a folder
FILE_INPUTS = re.compile(
    r".*_name(_?\d+)?|model_path|text_encoder_?\d|mmproj|sensitivity|measurement"
)
TO_A_SIZE = ("fit this GPU", "mix for a size", "size in GB")  # of pack_to: they read measurements
JSON_VALUES = (str, int, float, list, dict)  # what a prompt may have instead of a connection
FILE_VERSIONS = FileVersions()  # lives as long as ComfyUI's cache of node outputs


class FeatherweightExtension(ComfyExtension):
    """What ComfyUI asks for the nodes of this pack."""

    async def on_load(self):
        register_folders()
        watch_prompts()
        PackedPatcher.on_patches = staticmethod(show_unused_patches)
        host.raise_if_cancelled = comfy.model_management.throw_exception_if_processing_interrupted
        host.free_memory = comfy.model_management.free_memory
        host.progress = lambda text, count: Progress(text).track(range(count))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes, left_out = [], {}
        for name in file_names():
            file = name.replace(".", "/")
            try:
                nodes += find_nodes(import_file(name))
            except (ImportError, AttributeError, TypeError) as error:  # a changed host raises these
                log.debug("nodes/%s.py could not be loaded.", file, exc_info=True)
                left_out.setdefault(str(error), []).append(re.sub(r"\W|_", " ", name))
            except Exception:
                log.exception(
                    "nodes/%s.py could not be loaded; its nodes are missing.", file
                )
        for error, names in left_out.items():
            log_lack(error, f"these nodes are left out: {', '.join(names)}")
        nodes = [node for node in nodes if not is_taken(node.GET_SCHEMA().node_id)]
        for node in nodes:
            node.execute = classmethod(release_files_on_error(node.execute.__func__))
        help_pages.serve(nodes)
        return nodes


def file_names() -> list[str]:
    """Returns the modules of this folder and of `legacy`, in the order of registration."""
    legacy = [str(Path(folder) / "legacy") for folder in __path__]
    return sorted(
        file.name
        for file in (*pkgutil.iter_modules(__path__), *pkgutil.iter_modules(legacy, "legacy."))
    )


def import_file(name: str) -> ModuleType | None:
    """Imports a module with nodes; returns None for a module without any.

    The imports are written out, so that the name of a file cannot choose what is imported.
    """
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
        case "legacy.nunchaku":
            from .legacy import nunchaku as module
        case "load_checkpoint":
            from . import load_checkpoint as module
        case "load_diffusion_model":
            from . import load_diffusion_model as module
        case "load_side_models":
            from . import load_side_models as module
        case "load_text_encoder":
            from . import load_text_encoder as module
        case "measure_sensitivity":
            from . import measure_sensitivity as module
        case "measure_speed":
            from . import measure_speed as module
        case "pack_model":
            from . import pack_model as module
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


def release_files_on_error(execute: Callable) -> Callable:
    """Returns a node's function that leaves no file mapped where it raises.

    ComfyUI keeps the error until the next prompt, and with it the variables of all functions that
    it went through. On Windows a mapped file can be neither deleted nor replaced.
    """
    @functools.wraps(execute)
    def run(*arguments, **inputs):
        try:
            return execute(*arguments, **inputs)
        except Exception as error:
            while error is not None:
                traceback.clear_frames(error.__traceback__)
                error = error.__cause__ or error.__context__
            raise
    return run


def find_nodes(module: ModuleType | None) -> list[type[io.ComfyNode]]:
    """Returns the node classes that a module defines or makes from a table.

    Raises whatever a class raises that cannot define its schema on this host.
    """
    if module is None:
        return []
    nodes = [
        value
        for value in (*vars(module).values(), *getattr(module, "NODE_CLASS_MAPPINGS", {}).values())
        if isinstance(value, type)
        and issubclass(value, io.ComfyNode)
        and value.__module__ == module.__name__
    ]
    for node in nodes:
        node.GET_SCHEMA()
        if "fingerprint_inputs" not in vars(node):
            setattr(node, "fingerprint_inputs", classmethod(_count_file_versions))  # noqa: B010  a method
        _check_models(node)
        keep_text(node)
    return nodes


def _check_models(node: type[io.ComfyNode]):
    """Has a node raise ValueError for a value of a prompt, such as a text, in place of a model."""
    schema = node.GET_SCHEMA()
    types = {each.id: each.io_type for each in schema.inputs
             if isinstance(each, io.Model.Input | io.Clip.Input)}
    execute = node.execute.__func__

    @functools.wraps(execute)
    def checked(cls, *args, **inputs):
        for name, expected in types.items():
            given = inputs.get(name)
            is_list = schema.is_input_list and isinstance(given, list)
            values: list = given if is_list else [given]  # pyright: ignore[reportAssignmentType]
            for value in values:
                if isinstance(value, JSON_VALUES):
                    raise ValueError(
                        f"{schema.display_name}: {name} is {safe_repr(value)}, expected a"
                        f" {expected}. Connect the output of a loader with it.")
        return execute(cls, *args, **inputs)

    if types:
        setattr(node, "execute", classmethod(checked))  # noqa: B010  a method


def _count_file_versions(cls, **inputs) -> int:
    """Returns a number that changes when one of a node's files is replaced under the same name.

    The host compares it to decide whether the node has to run again.
    """
    names = (value for name, value in inputs.items() if FILE_INPUTS.fullmatch(name))
    return FILE_VERSIONS.update(names, inputs.get("pack_to") in TO_A_SIZE)


def is_taken(node_id: str) -> bool:
    """Returns whether another pack has registered a legacy id.

    Its class stays registered, because other packs may call it.
    """
    if node_id.startswith(OWN_PREFIX) or node_id not in host_nodes.NODE_CLASS_MAPPINGS:
        return False
    log.info("%s is provided by another node pack and stays with it.", node_id)
    return True
