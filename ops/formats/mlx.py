"""Formats of MLX's affine quantisation: unsigned integers with a scale and a bias for each group.

value = code * scale + bias. A row is a stream of bits, the lowest first, in words of 32 bits. What
MLX calls mxfp4, mxfp8 and nvfp4 are formats of other files too (`integers`, `comfyui`).

Source: MLX 0.32 `mlx/ops.cpp` and `mlx/backend/cpu/quantized.cpp`.
"""
from functools import partial

import torch

from .comfyui import with_addend
from .integers import ENDINGS, KINDS
from .row_layout import FAMILIES, Codes, RowFamily

MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUP = 64


def mlx_family(bits: int, scale_dtype: torch.dtype) -> RowFamily:
    """Returns the family of affine codes of some bits, one of `MLX_BITS`, with scales and biases of
    a dtype of `ENDINGS`."""
    return FAMILIES[f"MLX_INT{bits}{ENDINGS[scale_dtype]}"]


def _define_families():
    for dtype, ending in ENDINGS.items():
        for bits in MLX_BITS:
            RowFamily(f"MLX_INT{bits}{ending}", partial(
                with_addend, Codes(bits, "stream"), KINDS[dtype],
                title=f"MLX int{bits}"), (MLX_GROUP,))


_define_families()
