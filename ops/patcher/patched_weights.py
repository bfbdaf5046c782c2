"""Weights with their patches in them: one at a time, as a state dict, and for a file.

The host rounds a patched weight to the model's dtype, and so does what reads one here; whoever
packs it next would round twice. So packing takes them in float32, some rows at a time.
"""
from collections.abc import Callable, Sequence

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import LazyCastingParam

from ..adapters import slice_patch
from ..layers import PackedLayer
from ..packed_layout import QuantizedTensor, is_packed
from ..packed_tensor import relabel
from ..patched_state_dict import PatchedWeights
from ..row_slicing import rows_are_whole_blocks, take_rows
from ..stochastic_rounding import stochastic_round
from .applied_patches import layer_of, packed_weight

# what the host's quantised layers keep beside their weight
QUANT_SIDE_KEYS = ("input_scale", "pre_quant_scale")

Patch = tuple  # (strength, value, strength_model, offset, function), as the host keeps them


# --- rounded, as the host reads them ---


def patched_weight(key: str, patches: list, weight: torch.Tensor, layer) -> torch.Tensor:
    """Return a packed weight dense, with its patches in it."""
    dense = layer.dense_weight(weight, torch.float32)
    if not patches:
        return dense.to(weight.dtype)
    return stochastic_round(comfy.lora.calculate_weight(patches, dense, key), weight.dtype)


def patched_state_dict(patcher, weights: dict) -> PatchedWeights:
    """Return a state dict whose packed weights are made dense and patched as they are read."""
    def patched(key: str) -> torch.Tensor:
        return patcher.patch_weight_to_device(key, weights[key].device, return_weight=True)

    unpatched = patcher.all_patches.keys() - patcher.backup.keys()  # those in `backup` are patched
    lazy = [key for key in weights if packed_weight(patcher, key) is not None or key in unpatched]
    return PatchedWeights(weights, lazy, patched)


def file_state_dict(patcher, state_dict: dict, prefix: str) -> dict:
    """Return the host's state dict of the part below `prefix`, packed weights dense and patched."""
    for name in list(state_dict):
        key = prefix + name
        weight = packed_weight(patcher, key)
        if weight is None:
            if key in patcher.backup:  # patched already; the host would patch what is written again
                state_dict[name] = comfy.utils.get_attr(patcher.model, key)
            continue
        layer, start = layer_of(patcher, key), name.removesuffix("weight")
        for part in layer._parameters.keys() - {"bias"}:
            state_dict.pop(start + part, None)
        if is_packed(weight) or key in patcher.all_patches:  # written dense, one at a time
            shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            state_dict[name] = LazyCastingParam(patcher, key, shape)
        else:
            state_dict |= layer.quantized_parts(start)
    return state_dict


# --- in float32, to be packed ---


def weight_names(patcher, prefix: str = "") -> list[str]:
    """Names of a model's parameters and saved buffers below `prefix`, in order; a quantised weight
    is one."""
    model = patcher.model
    saved = model.state_dict().keys()
    found = dict(model.named_parameters(remove_duplicate=False))
    found |= {
        name: buffer for name, buffer in model.named_buffers(remove_duplicate=False)
        if name in saved
    }
    order = {name: index for index, name in enumerate(saved)}
    names = [
        name for name in found
        if name.startswith(prefix) and not (name.endswith(QUANT_SIDE_KEYS) and isinstance(
            found.get(f"{name.rpartition('.')[0]}.weight"), QuantizedTensor))
    ]
    return sorted(names, key=lambda name: order.get(name, len(order)))


def unpatched_weight(patcher, key: str) -> torch.Tensor:
    """A weight as the model holds it without its patches, which the host may have written into
    it."""
    if key in patcher.backup:
        return patcher.backup[key].weight
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return comfy.utils.get_attr(patcher.model, key)


def row_reader(patcher, key: str) -> Callable[[int, int], torch.Tensor]:
    """A function of (first row, end row) that gives these rows of the weight without its patches,
    in float32, a copy.

    It looks for the weight whenever it is called: the host may load the model, and write patches
    into it, at any time.
    """
    layer = (
        comfy.utils.get_attr(patcher.model, key.rpartition(".")[0]) if "." in key else patcher.model
    )

    def rows(start: int, stop: int) -> torch.Tensor:
        weight = unpatched_weight(patcher, key)
        if not isinstance(weight, QuantizedTensor):
            return (weight[start:stop] if weight.ndim else weight).detach().to(
                torch.float32, copy=True)
        whole = relabel(weight, dtype=torch.float32)
        if is_packed(weight):
            part = take_rows(whole, slice(start, stop))
            if not is_packed(part):
                return part.clone()
            return (
                layer.dense_weight(part, torch.float32)
                if isinstance(layer, PackedLayer)
                else part.dequantize()
            )
        dense, smoothing = whole.dequantize(), getattr(layer, "pre_quant_scale", None)
        return (dense if smoothing is None else dense * smoothing.to(dense))[start:stop].clone()

    return rows


def effective_patches(patcher, key: str) -> Sequence[Patch]:
    """A weight's patches as they run."""
    if hasattr(patcher, "effective_patches"):
        return patcher.effective_patches(key)
    return patcher.patches.get(key, ())


def patched_shape(patcher, key: str) -> torch.Size:
    """The shape of a weight with its patches, some of which put a larger one in its place."""
    weight = unpatched_weight(patcher, key)
    patches = patcher.patches.get(key, [])
    return comfy.lora.calculate_shape(patches, weight, key) if patches else weight.shape


def apply_patches(patches: Sequence[Patch], values: torch.Tensor, key: str) -> torch.Tensor:
    """Values with the host's patches in them, by its own arithmetic. values: float32, may be
    overwritten."""
    return comfy.lora.calculate_weight(list(patches), values, key)


def slice_patches(patches: Sequence[Patch], start: int, stop: int) -> list[Patch] | None:
    """The part of each patch that concerns some rows of its weight; None where one of them needs
    the whole weight at once."""
    parts = []
    for patch in patches:
        part = _slice_patch(patch, start, stop)
        if part is None:
            return None
        parts += part
    return parts


def _slice_patch(patch: Patch, start: int, stop: int) -> list[Patch] | None:
    strength, value, strength_model, offset, function = patch
    # another model's weight, with patches of its own
    if isinstance(value, list) and offset is None and function is None:
        (weight, convert), *others = value
        if isinstance(weight, QuantizedTensor) and not rows_are_whole_blocks(weight):
            return None
        inner = slice_patches(others, start, stop)
        return (
            None
            if inner is None
            else [
                (
                    strength,
                    [(take_rows(weight, slice(start, stop)), convert), *inner],
                    strength_model,
                    None,
                    None,
                )
            ]
        )
    if offset is None or offset[0] != 0:
        part = slice_patch(patch, start, stop)
        return None if part is None else [part]
    _, at, length = offset
    first, last = max(start, at), min(stop, at + length)
    if first >= last:
        return []
    part = slice_patch((strength, value, strength_model, None, function), first - at, last - at)
    return None if part is None else [(*part[:3], (0, first - start, last - first), None)]
