"""Where the weights of a loaded model lie: how many stay on its device, what keeps the others, and what that costs."""
import logging
from collections.abc import Callable

import comfy.model_management
import torch

from ..ops.patcher import adopt
from ..ops.patcher.placing import Placement, Whereabouts
from .devices import find_device
from .held import size_text

log = logging.getLogger(__name__)

TENTH = 1e8  # of a GB
Say = Callable[[str], None]  # takes a sentence for the user


def place(patcher, gpu_bytes: float, store: torch.device | str | None = None, store_bytes: float = 0, say: Say = log.warning):
    """A clone of a patcher of the host's, of which gpu_bytes stay on the device that computes.

    store: another device that keeps up to store_bytes of the rest, or its name as in the host's own nodes ("gpu:1", "cpu").
    What cannot be as it is asked for is said in a sentence, and the model runs all the same.
    """
    placed = adopt(patcher.clone())
    device = placed.load_device
    if comfy.model_management.is_device_cpu(device):
        say("The model computes on the CPU, where all of its weights are: there is nothing to place.")
        return placed
    total = comfy.model_management.get_total_memory(device)
    if gpu_bytes < 0:
        say(f"gpu_weights is {gpu_bytes / 1e9:g} GB, below 0; nothing stays, as with 0.")
    elif gpu_bytes > total:
        say(f"gpu_weights is {size_text(gpu_bytes)}, and {device} has {size_text(total)} in all; as much stays as ComfyUI finds"
            " room for.")
    store = _found_store(store, device, store_bytes, say)
    if store is not None and placed.is_dynamic():
        try:
            placed = placed.clone(disable_dynamic=True)
        except RuntimeError:  # the host: its loader has left no way to load it again
            say("A store needs the model outside dynamic VRAM, so it would have to be loaded again, for which its loader leaves"
                " no way; the store stays empty.")
            store = None
    placed.placement = Placement(int(max(0, gpu_bytes)), store, int(max(0, store_bytes)) if store is not None else 0)
    return placed


def place_clip(clip, gpu_bytes: float, store: torch.device | str | None = None, store_bytes: float = 0, say: Say = log.warning):
    """The same for a text encoder of the host's, a CLIP."""
    clip = clip.clone()
    clip.patcher = place(clip.patcher, gpu_bytes, store, store_bytes, say)
    clip.cond_stage_model = clip.patcher.model  # another one, where it was loaded again
    return clip


def _found_store(store: torch.device | str | None, device: torch.device, store_bytes: float, say: Say) -> torch.device | None:
    """The device of a store; None for the memory of the CPU, or where it cannot be one."""
    name = str(store)
    if isinstance(store, str):
        store, missing = find_device(store)
        if missing:
            say(f"There is no {name} here for a store; what does not stay lies in the memory of the CPU.")
    if store is None or comfy.model_management.is_device_cpu(store):
        return None
    if store == device:
        say(f"The store {name} is the device that computes; what does not stay lies in the memory of the CPU.")
        return None
    if store_bytes < 0:
        say(f"store_gb is {store_bytes / 1e9:g} GB, below 0; nothing is stored, as with 0.")
    return store


def planned_text(patcher) -> str:
    """Where the weights of a placed model will lie, as its node shows it before they do: 'at most 4.0 of 6.8 GB on cuda:0'."""
    size, budget = patcher.full_size(), patcher.placement.gpu_bytes
    return f"{size_text(size)} on {patcher.load_device}" if budget >= size else (
        f"at most {_of(budget, size)} on {patcher.load_device}")


def placed_text(patcher) -> str:
    """Where they lie, '4.0 of 6.8 GB on cuda:0', what each step copies, and what more room would save."""
    lies = patcher.whereabouts()
    text = f"{_of(lies.here, lies.size)} on {patcher.load_device}"
    if lies.stored:
        text += f", {size_text(lies.stored)} on {patcher.placement.store}"
    if lies.copied:
        text += f"\n{size_text(lies.copied)} copied per step{_hint(patcher, lies)}"
    return text


def _hint(patcher, lies: Whereabouts) -> str:
    """What as large a budget as the device has room for would save; in tenths of a GB, as the node takes it."""
    free = comfy.model_management.get_free_memory(patcher.load_device) - comfy.model_management.minimum_inference_memory()
    budget = min(lies.size + TENTH - 1, lies.here + free) // TENTH * TENTH
    if budget - lies.here < min(TENTH, lies.copied):
        return ""
    left = max(0, lies.copied - (budget - lies.here))
    return f"; with {budget / 1e9:.1f} GB here {size_text(left) if left else 'nothing'}"


def _of(part: float, whole: float) -> str:
    """'4.0 of 6.8 GB'."""
    text = size_text(whole)
    unit = text.split()[1]
    return f"{part / {'GB': 1e9, 'MB': 1e6}[unit]:.1f} of {text}"
