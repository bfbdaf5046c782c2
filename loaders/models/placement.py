"""Places a loaded model's weights: how many stay on its device and where the others are stored."""
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch

from ...ops.log import log
from ...ops.patcher import adopt, is_adoptable
from ...ops.patcher.residency import MemoryReport, Placement
from ..byte_sizes import part_text, size_text
from ..devices import CPU
from .fit_device import copying_text

# attribute of a model that ComfyUI-MultiGPU loads and places itself
DISTORCH2 = "_distorch_v2_meta"
TENTH_GB = 1e8  # bytes
MAX_BYTES = 1 << 60  # a workflow may ask for infinitely many
SHARING = "multigpu"  # the host's key for the clones of a model on the GPUs that share its work
Warn = Callable[[str], None]  # takes a sentence for the user
Stores = Sequence[tuple[torch.device, float]]  # devices and how many bytes each stores at most


def place(patcher, gpu_bytes: float | None, stores: Stores = (), warn: Warn = log.warning):
    """Returns a clone of a patcher that keeps `gpu_bytes` of its weights on its device.

    Unsupported settings are reported; the model still runs. A patcher that another pack loads or
    places itself is returned as it is.

    Args:
        patcher: the host's ModelPatcher.
        gpu_bytes: of weights that stay on the device that computes; None: as many as fit there, as
            the host decides.
        stores: other devices for the rest, filled in their order; what remains is in CPU memory.
        warn: is called with each sentence for the user.
    """
    if not is_adoptable(patcher) or hasattr(patcher.model, DISTORCH2):
        owner = (
            "ComfyUI-MultiGPU"
            if is_adoptable(patcher)
            else f"another pack's loader ({type(patcher).__name__})"
        )
        warn(f"The place of these weights is set by {owner}, so this node changes nothing. Load"
             " the file with a loader of ComfyUI or of this pack.")
        return patcher
    placed: Any = adopt(patcher.clone())
    if comfy.model_management.is_device_cpu(placed.load_device):
        warn("The model computes on the CPU, where all of its weights are: there is nothing to"
             " place.")
        return placed
    used_stores = tuple(
        (device, int(min(size, MAX_BYTES))) for device, size in stores
        if size > 0 and device not in (CPU, placed.load_device)
    )
    if used_stores and placed.is_dynamic():
        try:
            placed = _outside_dynamic_vram(placed)
        except RuntimeError:  # the host raises it for a model whose loader it cannot call again
            warn("Weights on other GPUs need the model outside dynamic VRAM, so it would have to be"
                 " loaded again, which its loader does not support. What does not stay on the"
                 " device is kept in main memory.")
            used_stores = ()
    if gpu_bytes is None:
        placed.placement = Placement(MAX_BYTES, used_stores) if used_stores else None
    else:
        placed.placement = Placement(int(min(max(0, gpu_bytes), MAX_BYTES)), used_stores)
    return placed


def _outside_dynamic_vram(patcher):
    """Returns a clone with the model loaded again outside dynamic VRAM, on every GPU that shares
    its work; raises RuntimeError if it cannot be loaded again."""
    clone = patcher.clone(disable_dynamic=True)
    # For a clone with the same number the host would use the model in dynamic VRAM.
    clone.clone_base_uuid = uuid.uuid5(patcher.clone_base_uuid, "outside dynamic VRAM")
    others = [
        other.clone(disable_dynamic=True)
        for other in patcher.get_additional_models_with_key(SHARING)
    ]
    clone.set_additional_models(SHARING, others)
    return clone


def place_clip(clip, gpu_bytes: float | None, stores: Stores = (), warn: Warn = log.warning):
    """Does the same as `place` for a CLIP of the host's."""
    clip = clip.clone()
    clip.patcher = place(clip.patcher, gpu_bytes, stores, warn)
    clip.cond_stage_model = clip.patcher.model  # another one, if it was loaded again
    return clip


def planned_text(patcher) -> str:
    """Returns where a placed model's weights will be, before it loads: 'at most 4.0 of 6.8 GB on
    cuda:0'."""
    size, placement = patcher.full_size(), patcher.placement
    if placement is None or placement.gpu_bytes == MAX_BYTES:
        text = f"as much of {size_text(size)} as fits on {patcher.load_device}"
        rest = " and ".join(str(device) for device, _ in placement.stores) if placement else ""
        return f"{text}, the rest on {rest}" if rest else text
    budget = placement.gpu_bytes
    if budget >= size:
        return f"{size_text(size)} on {patcher.load_device}"
    text = f"at most {part_text(budget, size)} on {patcher.load_device}"
    rest = size - budget
    for device, capacity in placement.stores:
        stored = min(capacity, rest)
        if rest:
            text += f", {size_text(stored)} on {device}"
        rest -= stored
    return text


def placed_text(patcher, report: MemoryReport | None = None) -> str:
    """Returns where a model's weights are, what each step copies, and what more memory would save.

    The first line is such as '4.0 of 6.8 GB on cuda:0'.

    Args:
        patcher: of the model.
        report: of its memory; None: the current one.
    """
    report = report or patcher.memory_report()
    text = f"{part_text(report.on_device, report.size)} on {patcher.load_device}"
    text += "".join(f", {size_text(size)} on {device}" for device, size in report.stored.items())
    if report.copied:
        text += f"\n{size_text(report.copied_per_step)} copied per step{_hint(patcher, report)}"
        if expected := copying_text(patcher):
            text += f"\nexpected: {expected}"
    return text


def _hint(patcher, report: MemoryReport) -> str:
    """Returns how much each step would copy with the largest budget that the device has memory for,
    in tenths of a GB, as the node takes it."""
    total_free: Any = comfy.model_management.get_free_memory(patcher.load_device)
    free = total_free - comfy.model_management.minimum_inference_memory()
    budget = min(report.size + TENTH_GB - 1, report.on_device + free) // TENTH_GB * TENTH_GB
    if budget - report.on_device < min(TENTH_GB, report.copied):
        return ""
    rest = max(0, 1 - (budget - report.on_device) / report.copied) * report.copied_per_step
    return f"; with {budget / 1e9:.1f} GB here {size_text(rest) if rest else 'nothing'}"
