"""Texts that nodes show on themselves in the editor."""
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ..loaders.held import held_text

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE"}


def show_text(text: str):
    """Show a text on the node that runs. Where none does, as in a script that calls a node's method, nothing is shown.

    The host is asked for the node, not the schema for a hidden unique_id: tools that write workflows as Python pass each
    hidden input to the node's method.
    """
    context = get_executing_context()
    if context is not None:
        from server import PromptServer  # only where a server runs; importing it starts half of one
        PromptServer.instance.send_progress_text(text, context.node_id)


def loaded(**parts) -> tuple:
    """The outputs of a loader, which shows what each of them holds. parts: by the keys of `TITLES`; None for one not there."""
    texts = []
    for name, part in parts.items():
        patcher = part if isinstance(part, ModelPatcher) else getattr(part, "patcher", None)
        if patcher is not None:
            texts.append(f"{TITLES[name]}: {held_text(patcher)}" if len(parts) > 1 else held_text(patcher))
    show_text("\n".join(texts))
    return tuple(parts.values())
