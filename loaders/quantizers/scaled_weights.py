"""Reads weights of 8 and 4 bits with scales that have no marker of ComfyUI's.

| in the file (layer `L`, weight (N, K)) | written by |
|---|---|
| `L.weight` fp8, `L.weight_scale_inv` of each block of rows and columns | transformers |
| `L.weight` fp8, `L.weight_scale` (), (N,) or (N, 1) | Black Forest Labs (fp8r), |
| | ModelOpt, compressed-tensors (float-quantized) |
| `L.weight` fp8, `L.scale_weight` (), (N,) or (N, 1) | scaled fp8 whose marker is lost |
| `L.weight` int8, `L.weight_scale` (), (N,) or (N, 1) | ModelOpt |
| `L.weight` uint8 (N, K / 2), the low nibble first, | Black Forest Labs, |
| `L.weight_scale` fp8 E4M3 (N, K / 16), `L.weight_scale_2` () | ModelOpt (nvfp4) |

Each becomes one packed tensor `L.weight`. A value is the number of its code times its scale,
whatever the name says; the last blocks of rows and columns may be short. ModelOpt's layers may have
`L.pre_quant_scale` (K,), factors of the input, which become those of the columns. `L.input_scale`
and `L.activation_scale` say nothing about the values.

Sources: transformers 5.14 `integrations/finegrained_fp8.py`, diffusers 0.42 `quantizers/bfl`.
"""
import math
from collections.abc import Iterable, Mapping

import torch

from ...ops.formats.comfyui import NVFP4_LOW
from ...ops.tensor.packed_layout import is_packed, packed_rows
from ...ops.tensor.packed_tensor import PackedTensor
from ..files.container import AGAIN, ProgressIter, WeightFile, describe, safe_repr
from .base import PartError, Quantizer, TypeOf, has_scaled_layers, layer_scaled_by
from .comfyui import FP8, SMOOTHING, smooth
from .comfyui_marks import OLD_SCALE, marked_layers
from .integers import BYTES, pack_nvfp4

SCALES, OF_BLOCKS, OF_TENSOR = ".weight_scale", ".weight_scale_inv", ".weight_scale_2"
ENDS = (OF_BLOCKS, SCALES, OLD_SCALE)
OF_INPUT = (".input_scale", ".activation_scale", ".scale_input")
TYPES = ("F8_E4M3", "F8_E5M2", "I8", "U8")  # of weights
BLOCK = 128  # rows and columns, unless the scales say otherwise
EXPECTED = "fp8, int8 or 4 bits of nvfp4 with scales of its rows, blocks or groups"


def _is_in(names: Iterable[str], metadata: Mapping[str, object], type_of: TypeOf) -> bool:
    names = dict.fromkeys(names)
    marked = marked_layers(metadata, names)
    return has_scaled_layers((name for name in names if name.rpartition(".")[0] not in marked),
                             ENDS, TYPES, type_of)


def join_scaled_weights(file: WeightFile, tensors: dict[str, torch.Tensor],
                        track: ProgressIter = iter):
    """Replaces each weight and its scales with one packed tensor, as `Quantizer.join`."""
    marked = marked_layers(file.metadata, tensors)
    for name in list(tensors):
        layer = layer_scaled_by(name, ENDS, tensors)
        weight = tensors.get(f"{layer}.weight")
        if layer in marked or weight is None or is_packed(weight) or weight.itemsize != 1:
            continue
        if marked and weight.dtype == torch.uint8:
            raise file.error_at(f"{layer}.weight", f"{safe_repr(layer)} has no comfy_quant, as"
                                " other layers have", AGAIN)
        scale = tensors.pop(name)
        if name.endswith(OF_BLOCKS):
            packed = _fp8_in_blocks(weight, scale)
        else:
            packed = _of_rows(weight, scale, tensors.pop(f"{layer}{OF_TENSOR}", None))
        smoothing = tensors.pop(f"{layer}.{SMOOTHING}", None)
        if packed is not None and smoothing is not None:
            try:
                packed = smooth(packed, smoothing)
            except PartError as error:
                raise file.error_at(f"{layer}.weight", f"{safe_repr(layer)}: {error}",
                                    error.advice) from error
        if packed is None:
            raise file.error_at(
                f"{layer}.weight",
                f"{safe_repr(f'{layer}.weight')} is {describe(weight)} and {safe_repr(name)} is"
                f" {describe(scale)}; expected {EXPECTED}", AGAIN)
        tensors[f"{layer}.weight"] = packed
        for end in OF_INPUT:
            tensors.pop(f"{layer}{end}", None)


def _of_rows(weight: torch.Tensor, scale: torch.Tensor,
             of_tensor: torch.Tensor | None) -> PackedTensor | None:
    """Returns the packed weight for scales of rows or of one tensor, or for those of nvfp4, None
    where the parts do not fit."""
    if weight.ndim != 2:
        return None
    rows = len(weight)
    if weight.dtype == torch.uint8:
        return None if of_tensor is None else pack_nvfp4(NVFP4_LOW, weight, scale, of_tensor)
    family = BYTES.get(weight.dtype)
    if (family is None or of_tensor is not None or not scale.is_floating_point()
            or scale.numel() not in (1, rows)):
        return None
    return packed_rows(family, weight, weight.shape,
                       scale=scale.float().flatten().expand(rows))


def _fp8_in_blocks(weight: torch.Tensor, scale: torch.Tensor) -> PackedTensor | None:
    """Returns the packed weight, or None where the scales do not fit it."""
    if weight.ndim != 2 or weight.dtype not in FP8 or not scale.is_floating_point():
        return None
    if scale.numel() == 1:
        return _of_rows(weight, scale, None)
    blocks = _block_lengths(weight.shape, scale)
    if blocks is None:
        return None
    (rows, columns), (block_rows, block_columns) = weight.shape, blocks
    # columns whose number is no multiple of a block's repeat its scale for smaller groups
    group = math.gcd(block_columns, columns)
    scales = scale.float().repeat_interleave(block_rows, 0)[:rows]
    scales = scales.repeat_interleave(block_columns // group, 1)[:, :columns // group]
    return packed_rows(FP8[weight.dtype], weight, weight.shape, (group,), scale=scales)


def _block_lengths(shape: torch.Size, scale: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the rows and columns of a block, or None where scales fit no blocks."""
    if scale.ndim != 2:
        return None
    lengths = []
    for size, count in zip(shape, scale.shape):
        if count == -(-size // BLOCK):
            lengths.append(BLOCK)
        elif count and size % count == 0:
            lengths.append(size // count)
        else:
            return None
    return tuple(lengths)


QUANTIZER = Quantizer(
    name="transformers, ModelOpt, Black Forest Labs or the like",
    methods={"fp8": "transformers in fp8"}, is_in=_is_in, join=join_scaled_weights)
