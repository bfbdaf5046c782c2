"""Reads fp8 weights with a scale for each block of rows and columns, as transformers writes them.

| in the file (weight of layer `L`, (N, K), in blocks of (R, C)) | in the state dict |
|---|---|
| `L.weight` fp8 E4M3, `L.weight_scale_inv` float (ceil(N / R), ceil(K / C)), | `L.weight` |
| `L.activation_scale` or none | packed |

A value is the number of its byte times the scale of its block, whatever the name says. The last
blocks of rows and columns may be short.

Source: transformers 5.14 `integrations/finegrained_fp8.py`.
"""
import math
import re
from collections.abc import Iterable

import torch

from ...ops.formats.comfy import F8_E4M3
from ...ops.packed_layout import packed_tensor
from ...ops.packed_tensor import PackedTensor
from .container import WeightFile, safe_repr

SCALES = ".weight_scale_inv"
OF_INPUT = ".activation_scale"
BLOCK = 128  # rows and columns, unless the scales say otherwise
AGAIN = "Download the file again, or get another conversion."


def has_block_fp8(names: Iterable[str]) -> bool:
    """Returns whether a file with tensors of these names has such weights."""
    return any(name.endswith(SCALES) for name in names)


def join_block_fp8(file: WeightFile, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces each weight and its scales in `tensors` with one packed tensor.

    Args:
        file: the file they come from.
        tensors: name -> tensor as stored; changed in place.

    Returns:
        `tensors`.

    Raises:
        WeightFileError: a weight and its scales do not belong together.
    """
    for key in [name for name in tensors if name.endswith(SCALES)]:
        layer = key.removesuffix(SCALES)
        weight, scale = tensors.get(f"{layer}.weight"), tensors.pop(key)
        packed = None if weight is None else _packed(weight, scale)
        if packed is None:
            actual = "there is no such weight" if weight is None else (
                f"the weight is {_describe(weight)}")
            raise file.error_at(
                key, f"{safe_repr(key)} is {_describe(scale)}, but {actual}; expected a weight in"
                f" fp8 E4M3 of two dimensions, with one scale for each block of {BLOCK} x {BLOCK}",
                AGAIN)
        tensors[f"{layer}.weight"] = packed
        tensors.pop(f"{layer}{OF_INPUT}", None)
    return tensors


def _packed(weight: torch.Tensor, scale: torch.Tensor) -> PackedTensor | None:
    """Returns the packed weight, or None where the scales do not fit it."""
    if weight.ndim != 2 or weight.dtype != torch.float8_e4m3fn or not scale.is_floating_point():
        return None
    blocks = _block_lengths(weight.shape, scale)
    if blocks is None:
        return None
    (rows, columns), (block_rows, block_columns) = weight.shape, blocks
    # columns whose number is no multiple of a block's repeat its scale for smaller groups
    group = math.gcd(block_columns, columns)
    scales = scale.float().repeat_interleave(block_rows, 0)[:rows]
    scales = scales.repeat_interleave(block_columns // group, 1)[:, :columns // group]
    return packed_tensor(F8_E4M3.of_columns(columns, group),
                         weight.contiguous().view(torch.uint8).view(-1), (rows, columns),
                         torch.float32, scales.flatten())


def _block_lengths(shape: torch.Size, scale: torch.Tensor) -> tuple[int, ...] | None:
    """Returns the rows and columns of a block, or None where scales fit no blocks."""
    if scale.numel() == 1:
        return tuple(shape)
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


def _describe(tensor: torch.Tensor) -> str:
    return f"{re.sub('^torch.', '', str(tensor.dtype))} {tuple(tensor.shape)}"
