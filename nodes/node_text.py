"""Texts that the editor shows on nodes.

ComfyUI keeps the last text of a node with its outputs: in its cache, from which the editor gets it
again where the node does not run, and in its history. `web/node_texts.js` shows it from there.
"""
import contextvars
import functools
import re
from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..loaders.comfyui.load_check import load_notes, patcher_of
from ..loaders.comfyui.model_summary import (
    arithmetic_text,
    dequantize_backend_text,
    memory_summary,
)
from ..loaders.models.fit_device import fit_text
from ..loaders.models.placement import placed_text, planned_text
from ..loaders.progress import set_text_sender
from ..ops.log import log
from ..ops.patcher.residency import MemoryReport
from .comfyui_server import log_lack, running_server

JOINER = "\u2060"  # has no width; what stands beside it is no markup
# Where a name could be markup of the editor, which shows links and in one design Markdown. Nothing
# else is marked, so that what is copied can be found.
MARKUP = re.compile("|".join((
    r"^(?=[ \t]*(?:[-+#=|:]|\d+[.)])| {4}| {0,3}\t)",  # lists, titles, tables, code
    r"(?<![^\W_])(?=_)|(?<=_)(?![^\W_])",  # emphasis
    r"(?<=\])(?=[(\[:])|(?<=[!\[])(?=\[)|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=@)",  # links, images
    r"(?<=\\)(?=[!-/:-@\[-_{-~])|(?<=&)(?=[#\w])")), re.MULTILINE | re.IGNORECASE)  # escapes
LOOKALIKES = str.maketrans("<>*`~", "‹›∗‘∼")
MAX_LENGTH = 20_000  # characters of a text
LINE_BREAK = "  \n"  # as Markdown has it, for an editor that takes texts on nodes for that

TITLES = {"model": "Model", "clip": "Text encoder", "vae": "VAE", "control_net": "ControlNet",
          "model_patch": "Model patch", "clip_vision": "CLIP vision"}
# Of a node's ui output: for each time that the node ran, over a list, [text]. Such a list is
# neither a file nor a text to ComfyUI's list of jobs, which has previews of those. It is an event
# too, which says that the text of a node of an earlier prompt has changed.
UI_KEY = "featherweight_text"

_kept: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("kept", default=None)


def keep_text(node: type[io.ComfyNode]):
    """Has ComfyUI keep with a node's outputs the text that the node shows."""
    name = vars(node).get("FUNCTION", "execute")  # a legacy node's method has a name of its own
    run = getattr(node, name).__func__

    @functools.wraps(run)
    def run_and_keep(cls, *args, **inputs):
        if "hidden" not in vars(cls):  # no copy, as ComfyUI calls: a script, or a class made of it
            return run(cls, *args, **inputs)
        text = [""]  # the same list in the cache and the history, so both have the newest text
        before = _kept.set(text)
        try:
            output = run(cls, *args, **inputs)
        finally:
            _kept.reset(before)
        if not isinstance(output, io.NodeOutput):
            output = io.NodeOutput(*output)
        shown: Any = output.ui or {}
        output.ui = {**(shown if isinstance(shown, dict) else shown.as_dict()), UI_KEY: [text]}
        return output

    setattr(node, name, classmethod(run_and_keep))
    setattr(node, "HAS_INTERMEDIATE_OUTPUT", True)  # noqa: B010  ComfyUI sends it from the cache


def show_text(text: str):
    """Shows a text on the node that runs now."""
    text_sender()(text)


def text_sender(is_kept: bool = True) -> Callable[[str], None]:
    """Returns a function that shows texts on the node that runs now, even after it has run.

    If no node runs, as in a script that calls a node's method, the function does nothing. The node
    comes from the host and not from a hidden unique_id in the schema, because tools that write
    workflows as Python pass each hidden input to the node's method.

    Args:
        is_kept: whether ComfyUI keeps the last text with the node's outputs.
    """
    try:
        from comfy_execution.utils import get_executing_context
        context, server = get_executing_context(), running_server()
        if context is not None and server is not None:
            show = functools.partial(
                server.send_progress_text, node_id=context.node_id, sid=server.client_id)
            return functools.partial(_send, show, server, context, _kept.get() if is_kept else None)
    except (ImportError, AttributeError) as error:
        log_lack(str(error), "nodes show no text on themselves")
    return lambda text: None


def _send(show: Callable[[str], None], server, context, kept: list[str] | None, text: str):
    """Shows a text on a node of the prompt that began last. Of an earlier one the editor gets an
    event that the text has changed: by now the id may be another node's.

    Args:
        show: shows a text on the node, in the browser tab that runs its prompt.
        server: the host's.
        context: the host's, of the node.
        kept: takes the text, if it is kept.
        text: that is shown.
    """
    text = text[:MAX_LENGTH]
    if kept is not None:
        kept[0] = text
    if getattr(server, "last_prompt_id", None) == context.prompt_id:  # the host's `main` sets it
        show(editor_text(text))
    elif kept is not None:
        server.send_sync(UI_KEY, {"prompt_id": context.prompt_id, "node": context.node_id})


set_text_sender(functools.partial(text_sender, is_kept=False))


def editor_text(text: str) -> str:
    """Returns a text as the editor gets it, which shows links, and in one design Markdown: names,
    which may come from files, are no markup, and lines are lines."""
    return MARKUP.sub(JOINER, text.translate(LOOKALIKES)).replace("\n", LINE_BREAK)


def loader_output(*notes: str | None, **parts) -> tuple:
    """Returns the outputs of a loader and shows on the node what each of them holds.

    The text changes whenever a part that was placed is loaded, and at the end of each run.

    Args:
        notes: sentences to show and log, for example about a missing device; None is skipped.
        parts: the outputs in their order, by keys of `TITLES`; None for a missing part.
    """
    show = text_sender()
    patchers = {key: patcher for key, part in parts.items()
                if (patcher := patcher_of(part)) is not None}
    titles = {key: f"{TITLES[key]}: " if len(parts) > 1 else "" for key in patchers}
    of_files = [note for patcher in patchers.values() for note in load_notes(patcher)]
    lines = list(dict.fromkeys(filter(None, [*notes, *of_files])))
    for note in lines:
        log.warning("%s", note)
    summaries, places, shown = {}, {}, None

    def describe(key: str, patcher: ModelPatcher, place: str | None):
        summaries[key] = [memory_summary(patcher), dequantize_backend_text(patcher),
                          arithmetic_text(patcher)]
        places[key] = fit_text(patcher), place

    def show_changes():
        nonlocal shown
        texts = ["\n".join(filter(None, [titles[key] + ", ".join(filter(None, summary)),
                                         *places[key]])) for key, summary in summaries.items()]
        text = "\n".join([*texts, *lines])
        if shown != text:
            shown = text
            show(text)

    def show_placement(key: str, patcher: ModelPatcher, report: MemoryReport):
        describe(key, patcher, placed_text(patcher, report))
        show_changes()

    for key, patcher in patchers.items():
        is_placed = getattr(patcher, "placement", None) is not None
        describe(key, patcher, planned_text(patcher) if is_placed else None)
        if is_placed:
            placed: Any = patcher
            placed.on_placement = functools.partial(show_placement, key)
    show_changes()
    return tuple(parts.values())
