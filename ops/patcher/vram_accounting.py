"""Keeps the host's count of loaded bytes equal to what is on the device, outside dynamic VRAM.

The host plans in each partial load which layers stay. Layers that fall out of the plan are no
longer counted but stay where they are; layers that it must cast anyway, such as most of a text
encoder's, it does not look at again. They add up until the device is full. Also, one byte less of
free memory can give another plan, and layers would move in each prompt.

Weights off the device are pinned, so that they are copied while layers compute. A driver cannot pin
read-only memory, such as a mapped file. A weight in a file is copied to memory first, as a move to
the device and back would do; where memory is short, it stays in the file and is not pinned.
"""
import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..tensor.packed_tensor import QuantizedTensor, inner_tensors
from ..tensor.read_only_memory import is_read_only
from .applied_patches import find_packed_weight

KEEP_FREE = 0.25  # fraction of the machine's memory that copies leave free


@contextlib.contextmanager
def accounted(patcher, device) -> Iterator[None]:
    """Moves layers to where the host planned them, after its partial load inside the block."""
    for module in patcher.model.modules():
        is_loaded = getattr(module, "comfy_patched_weights", False)
        # The host would take layers that it must cast for ones that are off the device already.
        if is_loaded and hasattr(module, "prev_comfy_cast_weights"):
            module.comfy_cast_weights = module.prev_comfy_cast_weights
            del module.prev_comfy_cast_weights
    deferred_pins = []
    with patcher.set_temporarily(deferred_pins=deferred_pins):
        yield
    for name in dict.fromkeys(key.rpartition(".")[0] for key in deferred_pins):
        move_out(patcher, name)
    offload_accounted(patcher, deferred_pins)
    patcher.model.model_loaded_weight_memory = bytes_on(patcher.model, device)


def offload_accounted(patcher, keys: list[str]):
    """Moves layers that are off the device into stores, and pins the other weights in `keys`."""
    patcher.model.packed_residency.fill_stores(patcher)
    for key in keys:
        patcher.pin_weight_to_device(key)


def nothing_to_plan(patcher, device, budget: float) -> bool:
    """Whether the layers on the device can stay and no other fits; unloads what exceeds the budget.

    Args:
        patcher: The patcher of a model that is loaded in part.
        device: Where to load it.
        budget: Bytes for weights and for the buffers that layers are copied through.
    """
    model = patcher.model
    if model.current_weight_patches_uuid != patcher.patches_uuid or model.device != device:
        return False
    free = budget - bytes_on(model, device) - model.model_offload_buffer_memory
    sizes = [size for *_, size, _, module, _ in patcher._load_list()
             if hasattr(module, "comfy_cast_weights")
             and not getattr(module, "comfy_patched_weights", False)]
    if not sizes or free >= min(sizes):
        return False
    if free < 0:
        patcher.partially_unload(patcher.offload_device, -free)
    model.model_loaded_weight_memory = bytes_on(model, device)
    return True


def move_out(patcher, name: str):
    """Moves a layer off the device, if it is there, without the patches that the host wrote."""
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
    """Returns the bytes of weights and of their functions on a device, as the host counts them."""
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


def _nbytes(value: torch.Tensor) -> int:
    if not isinstance(value, QuantizedTensor):
        return value.nbytes
    return sum(tensor.nbytes for tensor in inner_tensors(value))


def make_pinnable(patcher, key: str) -> bool:
    """Copies a weight out of a mapped file, if it is in one; returns whether it can be pinned."""
    weight = find_packed_weight(patcher, key)
    data = comfy.utils.get_attr(patcher.model, key) if weight is None else weight._qdata
    if not is_read_only(data):
        return True
    if not _may_copy(data.nbytes):
        return False
    if weight is None:
        comfy.utils.set_attr_param(patcher.model, key, data.clone())
    else:
        weight._qdata = data.clone()
    return True


def _may_copy(nbytes: int) -> bool:
    """Whether the host would pin that many bytes more, and a copy of them fits into memory."""
    pinned = comfy.model_management.TOTAL_PINNED_MEMORY + nbytes
    if pinned > comfy.model_management.MAX_PINNED_MEMORY:
        return False
    cpu = torch.device("cpu")
    free: Any = comfy.model_management.get_free_memory(cpu)
    total: Any = comfy.model_management.get_total_memory(cpu)
    return free - nbytes > total * KEEP_FREE
