"""The node Place Model (Featherweight)."""
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from comfy_api.latest import io

from ..loaders.byte_sizes import GB, size_text
from ..loaders.container.weight_file import safe_repr
from ..loaders.devices import CPU, DEFAULT, device_choices, find_device, total_memory
from ..loaders.models.placement import SHARING, place, placed_text, planned_text
from ..ops.log import log
from ..ops.patcher.residency import MemoryReport
from .node_text import text_sender
from .renamed_options import RENAMED
from .search_words import PLACING_WORDS

AUTOMATIC, ALL = "automatic", "all"
WORDS = {AUTOMATIC: -1.0, ALL: 1000.0}  # with the numbers in GB that workflows may have for them
GPU_WEIGHTS, STORE_GB = "GPU weights in GB", "at most there, in GB"
STORE_WORDS = (ALL,)  # of STORE_GB; GPU_WEIGHTS takes all


def size_or_word_input(name: str, title: str, words: Collection[str], **settings: Any):
    """Returns an optional input for a size in GB, by a number or a word; the first is the default.

    Args:
        name: id of the input.
        title: for people.
        words: of `WORDS`.
        settings: further ones of the host's class.
    """
    return io.MultiType.Input(
        io.String.Input(
            name, default=next(iter(words)), optional=True, display_name=title,
            extra_dict={RENAMED: {f"{WORDS[word]:g}": word for word in words}}, **settings,
        ),
        types=[io.Float, io.Int],
    )


def gigabytes(title: str, value: Any, words: Collection[str]) -> float:
    """Returns the size in GB that a value of `size_or_word_input` means.

    Raises ValueError for a value that is neither a number nor a word.
    """
    try:
        number = WORDS[value] if value in words else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"'{title}' is {safe_repr(value)}; expected {', '.join(words)} or a"
                         " number such as 5.")
    return number


def validate_sizes(gpu_weights: Any, store_gb: Any) -> bool | str:
    """Returns True, or a sentence about a value that is no size; None is a connection.

    Devices that this machine lacks are reported when the node runs; the model still runs.
    """
    try:
        for title, value, words in ((GPU_WEIGHTS, gpu_weights, WORDS),
                                    (STORE_GB, store_gb, STORE_WORDS)):
            if value is not None:
                gigabytes(title, value, words)
    except ValueError as error:
        return str(error)
    return True


def placing_inputs(what: str, values: str) -> list:
    """Returns the inputs that place the weights of a model or text encoder.

    Args:
        what: the part that is placed, for the tooltips.
        values: a sentence about values to start with.
    """
    return [
        size_or_word_input(
            "gpu_weights",
            GPU_WEIGHTS,
            WORDS,
            tooltip=f"How many GB of {what}'s weights stay on the GPU; others are copied layer by"
            f" layer, slower. automatic: ComfyUI decides. all: as many as fit. {values}",
        ),
        io.Combo.Input(
            "store",
            options=[
                str(CPU),
                *(name for name in device_choices() if name not in (str(CPU), DEFAULT)),
            ],
            default=str(CPU),
            optional=True,
            advanced=True,
            display_name="keep the rest on",
            tooltip="Where the other weights are. cpu: in main memory. gpu:N: on another GPU, which"
            " does not compute; what it has no memory for is in main memory.",
        ),
        size_or_word_input(
            "store_gb",
            STORE_GB,
            STORE_WORDS,
            advanced=True,
            tooltip="How many GB another GPU keeps at most. all: as many as fit.",
        ),
    ]


def place_and_report(
    place_part: Callable, part, gpu_weights: float | str, store: str, store_gb: float | str
):
    """Returns a placed clone of a model or text encoder; the node shows the placement at each run.

    Args:
        place_part: `place` or `place_clip`.
        part: a MODEL or CLIP.
        gpu_weights: GB of 10^9 bytes that stay on the device that computes, or one of WORDS.
        store: the name of the device that keeps the rest.
        store_gb: GB of 10^9 bytes that the store keeps at most, or ALL.
    """
    gpu_weights = gigabytes(GPU_WEIGHTS, gpu_weights, WORDS)
    store_gb = gigabytes(STORE_GB, store_gb, STORE_WORDS)
    show = text_sender()
    remarks = []
    compute = getattr(part, "patcher", part).load_device
    if compute != CPU:
        checks = (_check_budget(compute, gpu_weights), _check_store(compute, store, store_gb))
        remarks += filter(None, checks)
    stores = [(find_device(store)[0] or CPU, store_gb * GB)]
    gpu_bytes = None if gpu_weights == WORDS[AUTOMATIC] else gpu_weights * GB
    placed = place_part(part, gpu_bytes, stores, remarks.append)
    for remark in remarks:
        log.warning("%s", remark)
    texts = {}  # device -> text, of the GPUs that share the model's work

    def show_placement(patcher, report: MemoryReport):
        texts[patcher.load_device] = placed_text(patcher, report)
        if not patcher.is_multigpu_base_clone:
            clones = patcher.get_additional_models_with_key(SHARING)
            devices = {patcher.load_device, *(clone.load_device for clone in clones)}
            for device in texts.keys() - devices:
                del texts[device]
        show("\n".join([*(texts[device] for device in sorted(texts, key=str)), *remarks]))

    patcher = getattr(placed, "patcher", placed)
    if hasattr(patcher, "placement"):
        patcher.on_placement = show_placement
    is_placed = patcher is not getattr(part, "patcher", part) and compute != CPU
    planned = [planned_text(patcher)] if is_placed else []
    show("\n".join([*planned, *remarks]))
    return placed


def _check_budget(compute: torch.device, gpu_weights: float) -> str | None:
    if gpu_weights in WORDS.values():
        return None
    gpu_bytes, total = gpu_weights * GB, total_memory(compute)
    if gpu_bytes < 0:
        return f"{GPU_WEIGHTS} is {gpu_weights:g}, which is below 0; it is treated as 0."
    if gpu_bytes > total:
        return (
            f"{GPU_WEIGHTS} is {gpu_weights:g}, but {compute} has {size_text(total)} in total;"
            " ComfyUI keeps as much there as fits."
        )
    return None


def _check_store(compute: torch.device, store: str, store_gb: float) -> str | None:
    device, missing = find_device(store)
    if missing:
        return f"There is no {store} to keep the rest on; main memory is used."
    if device == compute:
        return f"{store} computes, so it does not keep the rest; main memory is used."
    if store_gb < 0 and device != CPU:
        return f"At most there, in GB is {store_gb:g}, which is below 0; it is treated as 0."
    return None


class PlaceModel(io.ComfyNode):
    """Sets how much of a diffusion model stays on the GPU, and where the rest is kept."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightPlaceModel",
            display_name="Place Model (Featherweight)",
            category="Featherweight",
            description="Sets how much of a model stays on the GPU, and where the rest is kept."
            " Each model has a budget of its own, with and without dynamic VRAM, packed or not."
            " The node shows the result.",
            search_aliases=[
                "gpu weights",
                "vram",
                "low vram",
                "budget",
                "offload",
                "block swap",
                "multigpu",
                "distorch",
                "virtual vram",
                "place model",
                *PLACING_WORDS,
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with or without LoRAs."),
                *placing_inputs(
                    "the model",
                    "Start with 3 on a 6 GB card, 5 on 8 GB, 9 on 12 GB.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, gpu_weights=None, store=None, store_gb=None):
        return validate_sizes(gpu_weights, store_gb)

    @classmethod
    def execute(cls, model, gpu_weights=AUTOMATIC, store=str(CPU), store_gb=ALL) -> io.NodeOutput:
        return io.NodeOutput(place_and_report(place, model, gpu_weights, store, store_gb))
