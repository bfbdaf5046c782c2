"""Texts that nodes show on themselves in the editor."""
import functools
import logging
from collections.abc import Callable

from comfy.model_patcher import ModelPatcher

from ..loaders.model_summary import dequantize_backend_text, memory_summary
from ..loaders.placement import placed_text, planned_text
from .host_server import log_lack, running_server

log = logging.getLogger(__name__)

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE"}


def show_text(text: str):
    """Show a text on the node that runs."""
    text_sender()(text)


def text_sender() -> Callable[[str], None]:
    """A function that shows texts on the node that runs now, also later on, while others run.

    Where none runs, as in a script that calls a node's method, nothing is shown. The host is asked
    for the node, not the schema for a hidden unique_id: tools that write workflows as Python pass
    each hidden input to the node's method.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context, server = get_executing_context(), running_server()
        if context is not None and server is not None:
            send = server.send_progress_text
            return lambda text: send(without_markup(text), context.node_id)
    except (ImportError, AttributeError) as error:
        log_lack(str(error), "nodes show no text on themselves")
    return lambda text: None


def without_markup(text: str) -> str:
    """A text whose names, which come from files, make no link and no element in an editor that
    shows texts as HTML."""
    return text.replace("<", "‹").replace(">", "›").replace("[[", "[ [")


def loader_output(*notes: str | None, **parts) -> tuple:
    """The outputs of a loader, which shows what each of them holds. parts: by the keys of `TITLES`;
    None for one not there.

    A placed one tells where it lies, anew whenever it is loaded and at the end of each run. notes:
    sentences to show with it, such as that a device is not there; None for one that is not needed.
    """
    show, texts = text_sender(), {}
    notes = list(dict.fromkeys(filter(None, notes)))
    for note in notes:
        log.warning("[Featherweight] %s", note)
    for name, part in parts.items():
        patcher = part if isinstance(part, ModelPatcher) else getattr(part, "patcher", None)
        if patcher is None:
            continue
        title = f"{TITLES[name]}: " if len(parts) > 1 else ""
        held = title + ", ".join(
            filter(None, (memory_summary(patcher), dequantize_backend_text(patcher)))
        )
        placed = getattr(patcher, "placement", None) is not None
        texts[name] = f"{held}\n{planned_text(patcher)}" if placed else held
        if placed:
            patcher.on_placement = functools.partial(_on_placement, show, texts, notes, name, held)
    show_text("\n".join([*texts.values(), *notes]))
    return tuple(parts.values())


def _on_placement(
    show, texts: dict[str, str], notes: list[str], name: str, held: str, patcher, lies
):
    texts[name] = f"{held}\n{placed_text(patcher, lies)}"
    show("\n".join([*texts.values(), *notes]))
