"""Where the weights of a loaded model lie: how many stay on its device, what keeps the others, and
what that costs."""
import logging
import uuid
from collections.abc import Callable, Sequence

import comfy.model_management
import torch

from ..ops.patcher import adopt, is_adoptable
from ..ops.patcher.residency import MemoryReport, Placement
from .devices import CPU
from .sizes import part_text, size_text

log = logging.getLogger(__name__)

# what ComfyUI-MultiGPU leaves on a model, whose loading it then takes over
DISTORCH2 = "_distorch_v2_meta"
TENTH_GB = 1e8  # of a GB
MAX_BYTES = 1 << 60  # bytes; a workflow may say that it wants endlessly many
SHARING = "multigpu"  # what the host calls the clones of a model on the GPUs that share its work
Warn = Callable[[str], None]  # takes a sentence for the user
Stores = Sequence[tuple[torch.device, float]]


def place(patcher, gpu_bytes: float, stores: Stores = (), say: Warn = log.warning):
    """A clone of a patcher of the host's, of which gpu_bytes stay on the device that computes.

    stores: other devices, each with the bytes of the rest that it keeps at most; they are filled in
    turn, and what they leave lies in the memory of the CPU. What cannot be so is said in a
    sentence, and the model runs all the same. What another pack loads or places in its own way is
    given back as it is.
    """
    if not is_adoptable(patcher) or hasattr(patcher.model, DISTORCH2):
        whose = (
            "ComfyUI-MultiGPU"
            if is_adoptable(patcher)
            else f"another pack's loader ({type(patcher).__name__})"
        )
        say(f"Where these weights lie is up to {whose}, so this node changes nothing. Load the"
            " file with a loader of ComfyUI or of this pack.")
        return patcher
    placed = adopt(patcher.clone())
    if comfy.model_management.is_device_cpu(placed.load_device):
        say("The model computes on the CPU, where all of its weights are: there is nothing to"
            " place."
            )
        return placed
    stores = tuple((device, int(min(size, MAX_BYTES))) for device,
                   size in stores if size > 0 and device not in (CPU, placed.load_device))
    if stores and placed.is_dynamic():
        try:
            placed = _outside_dynamic_vram(placed)
        except RuntimeError:  # the host: its loader has left no way to load it again
            say("Weights on other GPUs need the model outside dynamic VRAM, so it would have to be"
                " loaded again, for which its loader leaves no way; what does not stay lies in the"
                " memory of the CPU.")
            stores = ()
    placed.placement = Placement(int(min(max(0, gpu_bytes), MAX_BYTES)), stores)
    return placed


def _outside_dynamic_vram(patcher):
    """A clone with the model loaded again, and for each further GPU that shares its work. Raises
    RuntimeError."""
    clone = patcher.clone(disable_dynamic=True)
    # The host gives a model's work to what is loaded of it already, which is in dynamic VRAM under
    # the same number.
    clone.clone_base_uuid = uuid.uuid5(patcher.clone_base_uuid, "outside dynamic VRAM")
    others = [
        other.clone(disable_dynamic=True)
        for other in patcher.get_additional_models_with_key(SHARING)
    ]
    clone.set_additional_models(SHARING, others)
    return clone


def place_clip(clip, gpu_bytes: float, stores: Stores = (), say: Warn = log.warning):
    """The same for a text encoder of the host's, a CLIP."""
    clip = clip.clone()
    clip.patcher = place(clip.patcher, gpu_bytes, stores, say)
    clip.cond_stage_model = clip.patcher.model  # another one, where it was loaded again
    return clip


def planned_text(patcher) -> str:
    """Where the weights of a placed model will lie, as its node shows it before they do: 'at most
    4.0 of 6.8 GB on cuda:0'."""
    size, budget = patcher.full_size(), patcher.placement.gpu_bytes
    if budget >= size:
        return f"{size_text(size)} on {patcher.load_device}"
    text, left = f"at most {part_text(budget, size)} on {patcher.load_device}", size - budget
    for device, room in patcher.placement.stores:
        text += f", {size_text(min(room, left))} on {device}" if left else ""
        left -= min(room, left)
    return text


def placed_text(patcher, lies: MemoryReport | None = None) -> str:
    """Where they lie, '4.0 of 6.8 GB on cuda:0', what each step copies, and what more room would
    save. lies: if not as now."""
    lies = lies or patcher.memory_report()
    text = f"{part_text(lies.on_device, lies.size)} on {patcher.load_device}"
    text += "".join(f", {size_text(size)} on {device}" for device, size in lies.stored.items())
    if lies.copied:
        text += f"\n{size_text(lies.copied_per_step)} copied per step{_hint(patcher, lies)}"
    return text


def _hint(patcher, lies: MemoryReport) -> str:
    """What as large a budget as the device has room for would save; in tenths of a GB, as the node
    takes it."""
    free = (
        comfy.model_management.get_free_memory(patcher.load_device)
        - comfy.model_management.minimum_inference_memory()
    )
    budget = min(lies.size + TENTH_GB - 1, lies.on_device + free) // TENTH_GB * TENTH_GB
    if budget - lies.on_device < min(TENTH_GB, lies.copied):
        return ""
    left = max(0, 1 - (budget - lies.on_device) / lies.copied) * lies.copied_per_step
    return f"; with {budget / 1e9:.1f} GB here {size_text(left) if left else 'nothing'}"
