"""Inputs that name a file: which values they accept, before anything runs.

The options of an input say themselves which values they accept. Of another one ComfyUI says at that
input that it is not in the list, from which the editor offers the file that a workflow has a link
for.
"""
import re
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from comfy_api.latest import io

from ..loaders.paths.folders import list_files, list_model_folders, validate_files
from ..ops.log import log
from .comfyui_server import log_lack

# What the editor (`web/saved_values.js`) shows where an input has no options begins with the first;
# the second is its key in the input's description.
ADD_A_FILE, NO_OPTIONS = "add a file to models/", "without_options"

# the prompt that is being validated, in API format
PROMPT: ContextVar[Any] = ContextVar("PROMPT", default=None)


class Options(list):
    """Options of an input that accepts more values than it offers.

    The host asks with `in` whether it accepts a value. For its description of a node it copies the
    options with one argument, as dataclasses do.

    settings: what the input's description has besides.
    """

    settings: Mapping[str, str] = {}

    def __init__(self, options: Iterable[str], accepts: Callable[[Any], bool] | None = None):
        super().__init__(options)
        self._accepts = accepts

    def __contains__(self, value) -> bool:
        return super().__contains__(value) or bool(self._accepts and self._accepts(value))


def open_options(options: Iterable[str]) -> Options:
    """Returns the options of an input whose value is checked when the node runs.

    Such as devices: a workflow may name one of another machine.
    """
    return Options(options, lambda value: True)


def nullable_options(options: Iterable[str]) -> Options:
    """Returns the options of an input that old workflows may have a null for."""
    return Options(options, lambda value: value is None)


def is_name(value) -> bool:
    """Returns whether a value may stand for a file that need not exist."""
    return value is None or isinstance(value, str)


def file_options(options: Iterable[str], keys: Iterable[str]) -> Options:
    """Returns the options of an input that names a file: they accept each spelling of a name by
    which a file is found. Of another one the log says where it was looked for.

    Args:
        options: what is offered.
        keys: of the folders to look in.
    """
    def is_found(name) -> bool:
        if name in files.settings.values():
            return False
        found = validate_files(name, keys=keys)
        if found is not True:
            log.warning("%s", found)
        return found is True

    files = Options(options, is_found)
    if not files:
        folder = next(key for key in keys if not key.endswith("_gguf"))
        files.settings = {NO_OPTIONS: f"{ADD_A_FILE}{folder}, then press R"}
    return files


def file_input(name: str, options: Options, **settings: Any):
    """Returns an input with a choice of files, which says what to do where there is none.

    Args:
        name: id of the input.
        options: of `file_options`.
        settings: further ones of the host's class.
    """
    return io.Combo.Input(name, options=options, extra_dict=dict(options.settings), **settings)


def list_options(*keys: str, model_class: re.Pattern | None = None) -> Options:
    """Returns the options of an input for a file in some folders, or for a folder there.

    Args:
        keys: of the folders to look in.
        model_class: of the folders that are listed too, see `list_model_folders`; None: none are.
    """
    folders = list_model_folders(*keys, model_class=model_class) if model_class else []
    return file_options([*list_files(*keys), *folders], keys)


def validated_inputs() -> dict | None:
    """Returns the inputs of the node that is being validated, as the prompt has them.

    None if the host does not tell the prompt or the node.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context = get_executing_context()
    except (ImportError, AttributeError) as error:
        log_lack(str(error), "missing LoRAs are reported only when their node runs")
        return None
    graph = PROMPT.get()
    node = graph.get(context.node_id) if context and isinstance(graph, dict) else None
    return node.get("inputs") if isinstance(node, dict) else None
