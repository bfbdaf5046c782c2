"""Featherweight Place Model."""
import functools
import logging

import comfy.model_management
import torch
from comfy_api.latest import io

from ..loaders.devices import CPU, DEFAULT, device_choices, find_device
from ..loaders.placement import SHARING, place, placed_text, planned_text
from ..loaders.sizes import size_text
from .node_text import text_sender
from .number_checks import reject_nan

log = logging.getLogger(__name__)

GB = 1e9
ALL = 1000.0


def placing_inputs(what: str) -> list:
    """The inputs that say where the weights of a model or text encoder lie."""
    return [
        io.Float.Input(
            "gpu_weights",
            default=4.0,
            min=0.0,
            max=ALL,
            step=0.1,
            display_name="GPU weights in GB",
            tooltip=f"GB of {what}'s weights that stay on the GPU. The rest is copied in layer by"
            " layer, in each step: the same picture, slower. 0: none stays.",
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
            tooltip="Where the rest lies. gpu:N: in the memory of another GPU, which computes"
            f" nothing then, for which {what} is taken out of dynamic VRAM; what it does not hold"
            " lies in the memory of the CPU.",
        ),
        io.Float.Input(
            "store_gb",
            default=ALL,
            min=0.0,
            max=ALL,
            step=0.1,
            optional=True,
            advanced=True,
            display_name="store in GB",
            tooltip="GB of the store that are filled at most, where it is a GPU.",
        ),
    ]


def place_and_report(placing, part, gpu_weights: float, store: str, store_gb: float):
    """A model or text encoder placed by `placing`; the node tells what comes of it, now and in
    every run."""
    reject_nan(gpu_weights=gpu_weights, store_gb=store_gb)
    show, remarks = text_sender(), []
    compute = getattr(part, "patcher", part).load_device
    if compute != CPU:
        remarks += filter(
            None,
            [_budget_remark(compute, gpu_weights * GB), _store_remark(compute, store, store_gb)],
        )
    placed = placing(
        part, gpu_weights * GB, [(find_device(store)[0] or CPU, store_gb * GB)], remarks.append
    )
    for remark in remarks:
        log.warning("[Featherweight] %s", remark)
    patcher = getattr(placed, "patcher", placed)
    if hasattr(patcher, "placement"):
        patcher.on_placement = functools.partial(_report_placement, show, remarks, {})
    if getattr(patcher, "placement", None) is not None:
        remarks = [planned_text(patcher), *remarks]
    show("\n".join(remarks))
    return placed


def _budget_remark(compute: torch.device, gpu_bytes: float) -> str | None:
    total = comfy.model_management.get_total_memory(compute)
    if gpu_bytes < 0:
        return f"gpu_weights is {gpu_bytes / GB:g} GB, below 0; nothing stays, as with 0."
    return (
        None
        if gpu_bytes <= total
        else (
            f"gpu_weights is {size_text(gpu_bytes)}, and {compute} has {size_text(total)} in all;"
            " as much stays as ComfyUI finds room for."
        )
    )


def _store_remark(compute: torch.device, store: str, store_gb: float) -> str | None:
    device, missing = find_device(store)
    if missing:
        return f"There is no {store} here for a store; what does not stay lies in the memory of the CPU."
    if device == compute:
        return f"The store {store} is the device that computes; what does not stay lies in the memory of the CPU."
    return (
        f"store_gb is {store_gb:g} GB, below 0; nothing is stored, as with 0."
        if store_gb < 0 and device != CPU
        else None
    )


def _report_placement(show, remarks: list[str], texts: dict, patcher, lies):
    """texts: device -> what lies there, of the GPUs that share the work of the model."""
    texts[patcher.load_device] = placed_text(patcher, lies)
    if not patcher.is_multigpu_base_clone:
        there = {
            patcher.load_device,
            *(clone.load_device for clone in patcher.get_additional_models_with_key(SHARING)),
        }
        for device in texts.keys() - there:
            del texts[device]
    show("\n".join([*(texts[device] for device in sorted(texts, key=str)), *remarks]))


class PlaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightPlaceModel",
            display_name="Place Model (Featherweight)",
            category="Featherweight",
            description="Says how much of a model stays on the GPU, and where the rest lies. Each"
            " model has a budget of its own, with and without dynamic VRAM, packed or not. The"
            " node shows what it comes to.",
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
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with or without LoRAs."),
                *placing_inputs("the model"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, gpu_weights=None, store=None, store_gb=None):
        # what this machine has not is said when the node runs, and the picture comes all the same
        return True

    @classmethod
    def execute(cls, model, gpu_weights, store=str(CPU), store_gb=ALL) -> io.NodeOutput:
        return io.NodeOutput(place_and_report(place, model, gpu_weights, store, store_gb))
