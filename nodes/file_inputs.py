"""Where ComfyUI shows that a file is missing, before anything runs.

The host shows what `validate_inputs` returns at each input that is a parameter of it, whatever the
input's value is. So a node has one input with a file there. The options of its other inputs say
themselves which values they accept, and the host shows at which input a value is not accepted.
"""
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from comfy_execution.graph_utils import is_link

from ..loaders.paths.folders import validate_files
from .comfyui_server import log_lack

# the prompt that is being validated, in API format
PROMPT: ContextVar[Any] = ContextVar("PROMPT", default=None)


class Options(list):
    """Options of an input that accepts more values than it offers.

    The host asks with `in` whether it accepts a value. For its description of a node it copies the
    options with one argument, as dataclasses do.
    """

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


def file_options(options: Iterable[str], keys: Iterable[str], main: str) -> Options:
    """Returns the options of a file input that is not a parameter of `validate_inputs`.

    They accept each spelling of a file's name, and a missing file where `validate_main` names it.

    Args:
        options: what is offered.
        keys: of the folders to look in.
        main: the node's file input that is a parameter.
    """
    def accepts(value) -> bool:
        nodes = [inputs for inputs in _prompt_inputs() if value in inputs.values()]
        return exists(value) or (bool(nodes) and all(is_named(inputs) for inputs in nodes))

    def is_named(inputs: dict) -> bool:
        name = inputs.get(main)
        return not is_link(name) and not exists(name)

    def exists(name) -> bool:
        return validate_files(name, keys=keys) is True

    return Options(options, accepts)


def validate_main(name: str | None, others: Iterable[str], keys: Iterable[str],
                  empty: Iterable[str] = ()) -> bool | str:
    """Checks the main file for `validate_inputs`; a message names the node's other missing files.

    Args:
        name: as for `validate_files`.
        others: the node's other file inputs.
        keys: of the folders to look in.
        empty: options of the other inputs that are not files.

    Returns:
        True if the main file exists, else the message of `validate_files`.
    """
    if validate_files(name, keys=keys) is True:
        return True
    inputs = validated_inputs() or {}
    values = (inputs.get(other) for other in others)
    return validate_files(
        name, *(value for value in values if value and not is_link(value) and value not in empty),
        keys=keys)


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


def _prompt_inputs() -> Iterator[dict]:
    graph = PROMPT.get()
    for node in graph.values() if isinstance(graph, dict) else ():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if isinstance(inputs, dict):
            yield inputs
