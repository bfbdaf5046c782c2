"""Texts that nodes show on themselves in the editor."""
import logging

from comfy.model_patcher import ModelPatcher

from ..loaders.held import held_text

log = logging.getLogger(__name__)

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE"}


def show_text(text: str):
    """Show a text on the node that runs. Where none does, as in a script that calls a node's method, nothing is shown.

    The host is asked for the node, not the schema for a hidden unique_id: tools that write workflows as Python pass each
    hidden input to the node's method.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context = get_executing_context()
        if context is not None:
            from server import PromptServer  # only where a node runs; importing it starts half of a server
            PromptServer.instance.send_progress_text(text, context.node_id)
    except (ImportError, AttributeError):
        log.debug("[Featherweight] This ComfyUI shows no text on a node.", exc_info=True)


def loaded(**parts) -> tuple:
    """The outputs of a loader, which shows what each of them holds. parts: by the keys of `TITLES`; None for one not there."""
    texts = []
    for name, part in parts.items():
        patcher = part if isinstance(part, ModelPatcher) else getattr(part, "patcher", None)
        if patcher is not None:
            texts.append(f"{TITLES[name]}: {held_text(patcher)}" if len(parts) > 1 else held_text(patcher))
    show_text("\n".join(texts))
    return tuple(parts.values())
