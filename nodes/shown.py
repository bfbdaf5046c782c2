"""Texts that nodes show on themselves in the editor."""
import functools
import logging
from collections.abc import Callable

from comfy.model_patcher import ModelPatcher

from ..loaders.held import held_text, unpacked_by
from ..loaders.placing import placed_text

log = logging.getLogger(__name__)

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE"}


def show_text(text: str):
    """Show a text on the node that runs."""
    shower()(text)


def shower() -> Callable[[str], None]:
    """A function that shows texts on the node that runs now, also later on, while others run.

    Where none runs, as in a script that calls a node's method, nothing is shown. The host is asked for the node, not the schema
    for a hidden unique_id: tools that write workflows as Python pass each hidden input to the node's method.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context = get_executing_context()
        if context is not None:
            from server import PromptServer  # only where a node runs; importing it starts half of a server
            return functools.partial(PromptServer.instance.send_progress_text, node_id=context.node_id)
    except (ImportError, AttributeError):
        log.debug("[Featherweight] This ComfyUI shows no text on a node.", exc_info=True)
    return lambda text: None


def loaded(*notes: str | None, **parts) -> tuple:
    """The outputs of a loader, which shows what each of them holds. parts: by the keys of `TITLES`; None for one not there.

    notes: sentences to show with it, such as that a device is not there; None for one that is not needed.
    """
    texts = []
    for name, part in parts.items():
        patcher = part if isinstance(part, ModelPatcher) else getattr(part, "patcher", None)
        if patcher is not None:
            placed = None if getattr(patcher, "placement", None) is None else placed_text(patcher)
            text = ", ".join(filter(None, (held_text(patcher), placed, unpacked_by(patcher))))
            texts.append(f"{TITLES[name]}: {text}" if len(parts) > 1 else text)
    notes = list(dict.fromkeys(filter(None, notes)))
    for note in notes:
        log.warning("[Featherweight] %s", note)
    show_text("\n".join([*texts, *notes]))
    return tuple(parts.values())
