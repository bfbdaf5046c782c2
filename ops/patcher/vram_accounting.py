"""What the host counts as loaded lies on the device, and nothing more: outside dynamic VRAM, where
it loads models in part.

The host plans anew in each load which layers stay. Those that fall out of the plan it counts no
more and leaves where they are; those it must cast anyway, as most of a text encoder, it does not
even look at again. They add up until the device is full. And a byte less of free memory can give
another plan, so that layers would travel in each prompt.

Weights that stay off the device are pinned, from where copies run while layers compute. A driver
pins no memory that may not be written, such as a mapped file. A weight that is still there is
copied first, as it is by a way to the device and back; where there is not enough memory, it stays
in the file and is not pinned.
"""
import contextlib

import comfy.model_management
import comfy.utils
import torch

from ..packed_layout import QuantizedTensor
from ..read_only_memory import is_read_only
from .applied_patches import packed_weight

KEPT_FREE = 4  # one part in so many of the memory of the machine is not filled with copies


@contextlib.contextmanager
def accounted(patcher, device):
    """Around the host's load to this device in part: afterwards the layers lie where it planned
    them."""
    for module in patcher.model.modules():
        is_loaded = getattr(module, "comfy_patched_weights", False)
        # Or the host takes layers it must cast for some that are off the device already.
        if is_loaded and hasattr(module, "prev_comfy_cast_weights"):
            module.comfy_cast_weights = module.prev_comfy_cast_weights
            del module.prev_comfy_cast_weights
    unpinned = []
    with patcher.meanwhile(unpinned=unpinned):
        yield
    for name in dict.fromkeys(key.rpartition(".")[0] for key in unpinned):
        move_out(patcher, name)
    offload_accounted(patcher, unpinned)
    patcher.model.model_loaded_weight_memory = bytes_on(patcher.model, device)


def offload_accounted(patcher, keys: list[str]):
    """Bring layers that wait off the device into stores, and pin the weights of the others."""
    patcher.model.packed_residency.fill_stores(patcher)
    for key in keys:
        patcher.pin_weight_to_device(key)


def nothing_to_plan(patcher, device, budget: float) -> bool:
    """Whether what lies on the device may stay and nothing more fits; what is too much leaves it.

    budget: bytes of weights, and of the buffers that layers travel through.
    """
    model = patcher.model
    if model.current_weight_patches_uuid != patcher.patches_uuid or model.device != device:
        return False
    room = budget - bytes_on(model, device) - model.model_offload_buffer_memory
    waiting = [size for *_, size, _, module, _ in patcher._load_list()
               if hasattr(module, "comfy_cast_weights")
               and not getattr(module, "comfy_patched_weights", False)]
    if not waiting or room >= min(waiting):
        return False
    if room < 0:
        patcher.partially_unload(patcher.offload_device, -room)
    model.model_loaded_weight_memory = bytes_on(model, device)
    return True


def move_out(patcher, name: str):
    """Take a layer off the device, if it is there. The host has given it its patches already."""
    module = patcher.model.get_submodule(name)
    if not getattr(module, "comfy_patched_weights", False):
        return
    for param in module._parameters:
        backup = patcher.backup.pop(f"{name}.{param}", None)
        if backup is not None:
            comfy.utils.set_attr_param(patcher.model, f"{name}.{param}", backup.weight)
    module.to(patcher.offload_device)
    module.comfy_patched_weights = False


def bytes_on(model, device) -> int:
    """Return the bytes of weights and of what wraps them on a device, as the host counts them."""
    nbytes = 0
    for module in model.modules():
        loaded = getattr(module, "comfy_patched_weights", False)
        saved = (value for name, value in module._buffers.items()
                 if name not in module._non_persistent_buffers_set)
        nbytes += sum(_nbytes(value) for value in (*module._parameters.values(), *saved)
                      if value is not None and (loaded or value.device == device))
        functions = (*getattr(module, "weight_function", ()), *getattr(module, "bias_function", ()))
        nbytes += sum(function.move_to(device=device) for function in functions
                      if hasattr(function, "move_to"))
    return nbytes


def _nbytes(value) -> int:
    parts = (
        [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        if isinstance(value, QuantizedTensor)
        else [value]
    )
    return sum(part.nbytes for part in parts)


def make_pinnable(patcher, key: str) -> bool:
    """Copy a weight that lies in a mapped file. Returns whether it can be pinned."""
    weight = packed_weight(patcher, key)
    data = comfy.utils.get_attr(patcher.model, key) if weight is None else weight._qdata
    if not is_read_only(data):
        return True
    if not _room_for(data.nbytes):
        return False
    if weight is None:
        comfy.utils.set_attr_param(patcher.model, key, data.clone())
    else:
        weight._qdata = data.clone()
    return True


def _room_for(nbytes: int) -> bool:
    """Whether the host pins at all, and so many bytes more, and the memory of the machine has room
    for a copy of them."""
    if (
        comfy.model_management.TOTAL_PINNED_MEMORY + nbytes
        > comfy.model_management.MAX_PINNED_MEMORY
    ):
        return False
    cpu = torch.device("cpu")
    free, total = (
        comfy.model_management.get_free_memory(cpu),
        comfy.model_management.get_total_memory(cpu),
    )
    return free - nbytes > total / KEPT_FREE
