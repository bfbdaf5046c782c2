"""Formats of unsigned integers with a scale, and a zero or a minimum, for each group of columns.

GPTQ, AutoRound, AWQ, compressed-tensors, optimum-quanto, HQQ, torchao and MLX store weights so, in
several orders, which their readers in `loaders/quantizers` bring into the order of the values.
Sources of the formulas: auto-round 0.16.1 `auto_round_extension/torch/qlinear_torch.py`, autoawq
0.2.9 `awq/utils/packing_utils.py`, compressed-tensors 0.20.0 `quantization/lifecycle/forward.py`,
optimum-quanto 0.2.7 `tensor/weights/qbits.py`, hqq 0.2.8 `core/quantize.py`, MLX 0.32 `mlx/ops.cpp`
and `mlx/backend/cpu/quantized.cpp`.

A file has one of many combinations of bits, dtype of the scales, zeros and order of the columns.
Each is a family of its own, which `integer_family` or `family_with_minimum` returns.
"""
from functools import partial

import torch

from .comfy_quant import E2M1, LOW_NIBBLES, NVFP4_GROUP, in_groups, nvfp4
from .row_layout import FAMILIES, Codes, Numbers, RowFamily, RowLayout

# dtype of scales -> its ending in the names of families, and its kind
ENDINGS = {torch.bfloat16: "", torch.float16: "_HALF", torch.float32: "_FLOAT"}
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32 bytes"}
BITS = (2, 3, 4, 5, 6, 7, 8)
MX_GROUP, MLX_GROUP = 32, 64
HQQ_BITS, MLX_BITS = (2, 4, 8), (2, 3, 4, 5, 6, 8)
# who adds a minimum -> the bits of codes, columns of a group, and dtype of the minima, if it is not
# that of the scales
WITH_MINIMUM = {"quanto": ((4, 2), 128, None), "HQQ": (HQQ_BITS, 64, torch.float32),
                "MLX": (MLX_BITS, MLX_GROUP, None)}


def zero_bits(bits: int) -> int:
    """Returns the bits of a stored zero of codes of some bits: the same, or 8 where those do not
    divide a byte."""
    return 8 if 8 % bits else bits


def integer_family(bits: int, scale_dtype: torch.dtype, has_zeros: bool = False,
                   is_ordered: bool = False) -> RowFamily:
    """Returns the family of value = (code - zero) * scale, the difference being exact.

    Args:
        bits: one of `BITS`.
        scale_dtype: one of `ENDINGS`.
        has_zeros: whether groups have zeros; otherwise each zero is half the range of the codes.
        is_ordered: whether each column names its group, as with GPTQ's `desc_act`. The size of a
            format is then the number of groups, and otherwise that of the columns of one.
    """
    return FAMILIES[_name(bits, scale_dtype, has_zeros, is_ordered)]


def family_with_minimum(quantizer: str, bits: int, scale_dtype: torch.dtype) -> RowFamily:
    """Returns the family of value = code * scale + minimum.

    The minimum is MLX's bias, minus optimum-quanto's shift, or minus HQQ's zero, a float, times the
    scale. Both products of the latter are exact in float32 for scales and zeros of 16 bits, so that
    the value is rounded once, as (code - zero) * scale is.

    Args:
        quantizer: a key of `WITH_MINIMUM`.
        bits: one of its.
        scale_dtype: one of `ENDINGS`.
    """
    return FAMILIES[f"{quantizer.upper()}_INT{bits}{ENDINGS[scale_dtype]}"]


def _name(bits: int, scale_dtype: torch.dtype, has_zeros: bool, is_ordered: bool) -> str:
    base = "UINT" if has_zeros else "INT"
    return f"{base}{bits}_GROUPED{'_ORDERED' if is_ordered else ''}{ENDINGS[scale_dtype]}"


def _integers(bits: int, kind: str, has_zeros: bool, is_ordered: bool, columns: int,
              size: int) -> RowLayout:
    codes = Codes(bits, "stream", offset=0 if has_zeros else 1 << bits - 1)
    groups = size if is_ordered else columns // (size or columns)
    return RowLayout(columns, codes, Numbers(kind), groups,
                     zero_bits=zero_bits(bits) if has_zeros else 0, names_groups=is_ordered,
                     title=f"int{bits} in groups")


def _define_families():
    for dtype, ending in ENDINGS.items():
        for bits in BITS:
            for has_zeros in (False, True):
                for is_ordered in (False, True):
                    RowFamily(_name(bits, dtype, has_zeros, is_ordered),
                              partial(_integers, bits, KINDS[dtype], has_zeros, is_ordered),
                              (int(is_ordered),))
        for quantizer, (all_bits, group, minimum_dtype) in WITH_MINIMUM.items():
            for bits in all_bits:
                RowFamily(f"{quantizer.upper()}_INT{bits}{ending}", partial(
                    in_groups, Codes(bits, "stream"), scale=Numbers(KINDS[dtype]),
                    minimum=Numbers(KINDS[minimum_dtype or dtype]),
                    title=f"{quantizer} int{bits}"), (group,))


_define_families()
# of compressed-tensors: scales are divided by the file's number
NVFP4_QUOTIENT = RowFamily(
    "NVFP4_QUOTIENT", partial(nvfp4, "low first", row_scale="divide", title="nvfp4"),
    (NVFP4_GROUP,))
# of compressed-tensors and AutoRound; the 6 bits are E2M3, the sign above
E2M3 = tuple(sign * (mantissa / 8 if not exponent else (1 + mantissa / 8) * 2**(exponent - 1))
             for sign in (1, -1) for exponent in range(4) for mantissa in range(8))
MXFP4_ROWS, MXFP6_ROWS = (
    RowFamily(name, partial(in_groups, codes, scale=Numbers("e8m0"), title=title), (MX_GROUP,))
    for name, codes, title in (("MXFP4_ROWS", LOW_NIBBLES(E2M1), "mxfp4"),
                               ("MXFP6_ROWS", Codes(6, "stream", E2M3), "mxfp6")))
