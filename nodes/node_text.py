"""Texts that the editor shows on nodes."""
import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..loaders.inspect.model_summary import (
    dequantize_backend_text,
    host_product_text,
    memory_summary,
)
from ..loaders.models.compute_dtype import compute_text
from ..loaders.models.fit_device import fit_text
from ..loaders.models.load_check import load_notes, patcher_of
from ..loaders.models.placement import placed_text, planned_text
from ..loaders.progress import set_text_sender
from ..ops.patcher.residency import MemoryReport
from .comfyui_server import log_lack, running_server

log = logging.getLogger(__name__)

JOINER = "\u2060"  # between two letters, no line is broken there
LONG_WORD = 24  # characters that are kept in one line
LINE_BREAK = "  \n"  # as Markdown has it, for an editor that takes texts on nodes for that

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE", "control_net": "ControlNet",
          "model_patch": "Model patch", "clip_vision": "CLIP vision"}


def show_text(text: str):
    """Shows a text on the node that runs now."""
    text_sender()(text)


def text_sender() -> Callable[[str], None]:
    """Returns a function that shows texts on the node that runs now, even after it has run.

    If no node runs, as in a script that calls a node's method, the function does nothing. The node
    comes from the host and not from a hidden unique_id in the schema, because tools that write
    workflows as Python pass each hidden input to the node's method.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context, server = get_executing_context(), running_server()
        if context is not None and server is not None:
            send = server.send_progress_text
            return lambda text: send(editor_text(text), context.node_id)
    except (ImportError, AttributeError) as error:
        log_lack(str(error), "nodes show no text on themselves")
    return lambda text: None


set_text_sender(text_sender)


def editor_text(text: str) -> str:
    """Returns a text as the editor gets it: its words are kept whole, and its lines apart."""
    return keep_words(without_markup(text)).replace("\n", LINE_BREAK)


def without_markup(text: str) -> str:
    """Escapes a text, whose names may come from files, for an editor that shows HTML and links."""
    return text.replace("<", "‹").replace(">", "›").replace("[[", "[ [")


def keep_words(text: str) -> str:
    """Joins the letters of words, because the editor breaks the lines of such a text anywhere.

    In a longer word, such as the name of a tensor, lines are broken after dots, underscores and
    slashes; in a part that is longer still, anywhere.
    """
    def joined(word: re.Match) -> str:
        is_long = len(word[0]) > LONG_WORD
        parts = re.split(r"(?<=[._/\\])", word[0]) if is_long else [word[0]]
        return "".join(part if len(part) > LONG_WORD else JOINER.join(part) for part in parts)

    return re.sub(r"\S+", joined, text)


def loader_output(*notes: str | None, **parts) -> tuple:
    """Returns the outputs of a loader and shows on the node what each of them holds.

    A part that was placed updates the text with its placement whenever it is loaded and at the end
    of each run.

    Args:
        notes: sentences to show and log, for example about a missing device; None is skipped.
        parts: the outputs in their order, by keys of `TITLES`; None for a missing part.
    """
    show = text_sender()
    texts = {}
    patchers = {key: patcher for key, part in parts.items()
                if (patcher := patcher_of(part)) is not None}
    of_files = [note for patcher in patchers.values() for note in load_notes(patcher)]
    lines = list(dict.fromkeys(filter(None, [*notes, *of_files])))
    for note in lines:
        log.warning("[Featherweight] %s", note)

    def show_placement(key: str, summary: str, patcher: ModelPatcher, report: MemoryReport):
        texts[key] = f"{summary}\n{placed_text(patcher, report)}"
        show("\n".join([*texts.values(), *lines]))

    for key, patcher in patchers.items():
        title = f"{TITLES[key]}: " if len(parts) > 1 else ""
        summaries = (
            memory_summary(patcher),
            dequantize_backend_text(patcher),
            host_product_text(patcher),
            compute_text(patcher),
        )
        summary = title + ", ".join(filter(None, summaries))
        summary += f"\n{text}" if (text := fit_text(patcher)) else ""
        texts[key] = summary
        if getattr(patcher, "placement", None) is not None:
            texts[key] += f"\n{planned_text(patcher)}"
            placed: Any = patcher
            placed.on_placement = functools.partial(show_placement, key, summary)
    show_text("\n".join([*texts.values(), *lines]))
    return tuple(parts.values())
