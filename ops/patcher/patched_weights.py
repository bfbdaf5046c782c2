"""Patched weights: one at a time, as a state dict, for a file, and in float32 for packing.

The host rounds a patched weight to the model's dtype, and the readers of the first part do so too.
To pack such a weight would round it twice, so packing reads float32, some rows at a time.
"""
from collections.abc import Callable, Sequence

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import LazyCastingParam

from ..layers.packed_layers import PackedLayer
from ..patches.adapters import slice_patch
from ..stochastic_rounding import stochastic_round
from ..tensor.packed_layout import QuantizedTensor, is_packed
from ..tensor.packed_tensor import relabel
from ..tensor.row_slicing import rows_are_whole_blocks, take_rows
from .applied_patches import find_packed_weight, layer_of
from .patched_state_dict import PatchedWeights

# names of tensors that the host's quantised layers keep next to their weight
QUANT_SIDE_KEYS = ("input_scale", "pre_quant_scale")

Patch = tuple  # (strength, value, strength_model, offset, function), as the host keeps them


# --- rounded, as the host reads them ---


def patched_weight(key: str, patches: list, weight: torch.Tensor, layer) -> torch.Tensor:
    """Returns a packed weight dense, with its patches in it."""
    dense = layer.dense_weight(weight, torch.float32)
    if not patches:
        return dense.to(weight.dtype)
    return stochastic_round(comfy.lora.calculate_weight(patches, dense, key), weight.dtype)


def patched_state_dict(patcher, weights: dict) -> PatchedWeights:
    """Returns a state dict that dequantises and patches each weight when it is read."""
    def patched(key: str) -> torch.Tensor:
        return patcher.patch_weight_to_device(key, weights[key].device, return_weight=True)

    unpatched = patcher.all_patches.keys() - patcher.backup.keys()  # those in `backup` are patched
    lazy = [
        key for key in weights if find_packed_weight(patcher, key) is not None or key in unpatched
    ]
    return PatchedWeights(weights, lazy, patched)


def file_state_dict(patcher, state_dict: dict, prefix: str) -> dict:
    """Returns the host's state dict of the part below `prefix`, with patched weights for a file."""
    for name in list(state_dict):
        key = prefix + name
        weight = find_packed_weight(patcher, key)
        if weight is None:
            if key in patcher.backup:  # patched already; the host would patch it once more
                state_dict[name] = comfy.utils.get_attr(patcher.model, key)
            continue
        layer, start = layer_of(patcher, key), name.removesuffix("weight")
        for part in layer._parameters.keys() - {"bias"}:
            state_dict.pop(start + part, None)
        if is_packed(weight) or key in patcher.all_patches:  # the writer makes them dense, in turn
            shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            state_dict[name] = LazyCastingParam(patcher, key, shape)
        else:
            state_dict |= layer.quantized_parts(start)
    return state_dict


# --- in float32, to be packed ---


def weight_names(patcher, prefix: str = "") -> list[str]:
    """Returns the names of parameters and saved buffers below `prefix`, in state dict order.

    A quantised weight is one name: the scales of its layer are left out.
    """
    model = patcher.model
    saved_names = model.state_dict().keys()
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {
        name: buffer for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in saved_names
    }

    def is_of_a_quantised_weight(name: str) -> bool:
        weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
        return name.endswith(QUANT_SIDE_KEYS) and isinstance(weight, QuantizedTensor)

    order = {name: index for index, name in enumerate(saved_names)}
    names = [name for name in tensors
             if name.startswith(prefix) and not is_of_a_quantised_weight(name)]
    return sorted(names, key=lambda name: order.get(name, len(order)))


def unpatched_weight(patcher, key: str) -> torch.Tensor:
    """Returns a weight without its patches, also where the host has written them into it."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return comfy.utils.get_attr(patcher.model, key)


def row_reader(patcher, key: str) -> Callable[[int, int], torch.Tensor]:
    """Returns a function that reads rows of a weight without its patches.

    The function takes the first row and the one after the last, and returns a float32 copy. It
    looks the weight up in each call: the host may load the model, and write patches into it, at any
    time.
    """
    layer_name = key.rpartition(".")[0]
    layer = comfy.utils.get_attr(patcher.model, layer_name) if layer_name else patcher.model

    def read_rows(start: int, stop: int) -> torch.Tensor:
        weight = unpatched_weight(patcher, key)
        if not isinstance(weight, QuantizedTensor):
            rows = weight[start:stop] if weight.ndim else weight
            return rows.detach().to(torch.float32, copy=True)
        whole = relabel(weight, dtype=torch.float32)
        if is_packed(weight):
            rows = take_rows(whole, slice(start, stop))
            if not is_packed(rows):
                return rows.clone()
            if isinstance(layer, PackedLayer):
                return layer.dense_weight(rows, torch.float32)
            return rows.dequantize()
        dense = whole.dequantize()
        smoothing = getattr(layer, "pre_quant_scale", None)
        if smoothing is not None:
            dense = dense * smoothing.to(dense)
        return dense[start:stop].clone()

    return read_rows


def effective_patches(patcher, key: str) -> Sequence[Patch]:
    """Returns the patches of a weight that are applied to it."""
    if hasattr(patcher, "effective_patches"):
        return patcher.effective_patches(key)
    return patcher.patches.get(key, ())


def patched_shape(patcher, key: str) -> torch.Size:
    """Returns the shape of a weight with its patches, some of which enlarge it."""
    weight = unpatched_weight(patcher, key)
    patches = patcher.patches.get(key, [])
    return comfy.lora.calculate_shape(patches, weight, key) if patches else weight.shape


def apply_patches(patches: Sequence[Patch], values: torch.Tensor, key: str) -> torch.Tensor:
    """Applies patches to float32 values, which may be overwritten, by the host's arithmetic."""
    return comfy.lora.calculate_weight(list(patches), values, key)


def slice_patches(patches: Sequence[Patch], start: int, stop: int) -> list[Patch] | None:
    """Returns the parts of patches that change some rows; None if one needs the whole weight."""
    parts = []
    for patch in patches:
        part = _patch_parts(patch, start, stop)
        if part is None:
            return None
        parts += part
    return parts


def _patch_parts(patch: Patch, start: int, stop: int) -> list[Patch] | None:
    """Returns the part of a patch that changes some rows, in a list that may be empty."""
    strength, value, strength_model, offset, function = patch
    if isinstance(value, list) and offset is None and function is None:
        # another model's weight, with patches of its own
        (weight, convert), *inner_patches = value
        if isinstance(weight, QuantizedTensor) and not rows_are_whole_blocks(weight):
            return None
        inner_parts = slice_patches(inner_patches, start, stop)
        if inner_parts is None:
            return None
        rows = take_rows(weight, slice(start, stop))
        return [(strength, [(rows, convert), *inner_parts], strength_model, None, None)]
    if offset is None or offset[0] != 0:
        part = slice_patch(patch, start, stop)
        return None if part is None else [part]
    _, offset_start, length = offset
    first, last = max(start, offset_start), min(stop, offset_start + length)
    if first >= last:
        return []
    part = slice_patch((strength, value, strength_model, None, function),
                       first - offset_start, last - offset_start)
    return None if part is None else [(*part[:3], (0, first - start, last - first), None)]
