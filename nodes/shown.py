"""Texts that nodes show on themselves in the editor."""
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..loaders.held import held_text

NEEDED = [io.Hidden.unique_id]  # what a node that shows a text asks for, as its `hidden`
TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE"}


def show_text(node: type[io.ComfyNode], text: str):
    """Show a text on a node that runs."""
    if node.hidden is not None and node.hidden.unique_id:
        from server import PromptServer  # only where a server runs; importing it starts half of one
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def loaded(node: type[io.ComfyNode], **parts) -> io.NodeOutput:
    """The outputs of a loader, which shows what each of them holds. parts: by the keys of `TITLES`; None for one not there."""
    texts = []
    for name, part in parts.items():
        patcher = part if isinstance(part, ModelPatcher) else getattr(part, "patcher", None)
        if patcher is not None:
            texts.append(f"{TITLES[name]}: {held_text(patcher)}" if len(parts) > 1 else held_text(patcher))
    show_text(node, "\n".join(texts))
    return io.NodeOutput(*parts.values())
