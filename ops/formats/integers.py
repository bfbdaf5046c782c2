"""Formats of unsigned integers with a scale, and a zero or a minimum, for each group of columns.

GPTQ, AutoRound, AWQ, compressed-tensors, optimum-quanto and torchao store weights so, in several
orders, which their readers in `loaders/files` bring into the order of the values. Sources of the
formulas: auto-round 0.16.1 `auto_round_extension/torch/qlinear_torch.py`, autoawq 0.2.9
`awq/utils/packing_utils.py`, compressed-tensors 0.20.0 `quantization/lifecycle/forward.py`,
optimum-quanto 0.2.7 `tensor/weights/qbits.py`.

A file has one of many combinations of bits, dtype of the scales, zeros and order of the columns.
Each is a family of its own, which `integer_family` or `quanto_family` returns.
"""
from typing import Any

import torch

from ._rows import FAMILIES, RowFormat
from .base import Side, Terms
from .bits import byte_pairs, reinterpret, select, split_bits, split_stream
from .comfyui import NVFP4_LOW
from .svdquant import AWQ_INT4

SIDE_DTYPES = {torch.bfloat16: "", torch.float16: "_HALF", torch.float32: "_FLOAT"}
BITS = (2, 3, 4, 8)


class Integers(RowFormat):
    """value = (code - zero) * scale, both of a group of columns, the difference being exact.

    | tensor  | dtype, shape                  | meaning                                       |
    |---------|-------------------------------|-----------------------------------------------|
    | packed  | uint8 (rows * K * bits / 8,)  | codes, a stream of bits, the lowest bit first |
    | scale   | uint8                         | bytes of rows * groups `side_dtype`           |
    | scale_2 | uint8                         | zeros, where `has_zeros`: `zero_bits` each, a |
    |         |                               | row filled up to whole bytes                  |

    Attributes:
        side_dtype: of the scales.
        has_zeros: whether groups have zeros; otherwise each zero is half the range of the codes.
    """

    side_dtype: torch.dtype
    has_zeros = False

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return cls.sides_of_groups(columns // (sizes[0] or columns))

    @classmethod
    def sides_of_groups(cls, groups: int) -> tuple[Side, ...]:
        """Returns the sides of rows with a number of groups."""
        zeros = (Side(torch.uint8, -(-groups * cls.zero_bits() // 8)),) if cls.has_zeros else ()
        return Side(torch.uint8, groups * cls.side_dtype.itemsize), *zeros

    @classmethod
    def zero_bits(cls) -> int:
        """Returns the bits of a stored zero: those of a code, of 3 bits a byte."""
        return 8 if cls.bits == 3 else cls.bits

    @classmethod
    def zeros(cls, stored: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
        """Returns the zeros of some rows, integers (rows, groups)."""
        stored, width = stored.view(rows, -1), cls.zero_bits()
        if width == 8:
            return stored
        return split_bits(stored, width, 8 // width).view(rows, -1)[:, :groups]

    @classmethod
    def offset(cls) -> int:
        """Returns the zero that all groups have, 0 where they have zeros of their own."""
        return 0 if cls.has_zeros else 1 << cls.bits - 1

    @classmethod
    def number_pairs(cls) -> torch.Tensor:
        """Returns the two numbers of each byte of 4-bit codes, float32 in int64 (256,)."""
        return byte_pairs(torch.arange(16, dtype=torch.float32) - cls.offset())

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        """Returns the codes of some blocks, less `offset`, float32 (n, K)."""
        if cls.bits == 4:
            pairs = select(cls.constant("number_pairs", codes.device), codes)
            return pairs.view(torch.float32).view(len(codes), -1)
        fields = codes if cls.bits == 8 else split_stream(codes, cls.bits)
        return fields.float().sub_(cls.offset())

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, *sides: torch.Tensor) -> Terms:
        count = len(codes)
        scales = reinterpret(scale, cls.side_dtype).float().view(count, -1, 1)
        numbers = cls.numbers(codes).view(count, scales.shape[1], -1)
        if cls.has_zeros:
            numbers -= cls.zeros(sides[0], count, scales.shape[1]).unsqueeze(-1)
        return Terms(numbers, scales)


class OrderedIntegers(Integers):
    """The same with columns whose groups are in any order, as those of GPTQ's `desc_act`.

    The last of the sides, uint8, has the bytes of K int16: the group of each column.
    """

    groups = 1
    sizes = ("groups",)

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return (*cls.sides_of_groups(sizes[0]),
                Side(torch.uint8, columns * torch.int16.itemsize, is_shared=True))

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, *sides: torch.Tensor) -> Terms:
        count, group_of_column = len(codes), reinterpret(sides[-1], torch.int16).int()
        scales = reinterpret(scale, cls.side_dtype).float().view(count, -1)
        numbers = cls.numbers(codes)
        if cls.has_zeros:
            zeros = cls.zeros(sides[0], count, scales.shape[1])
            numbers -= zeros.index_select(1, group_of_column)
        return Terms(numbers, scales.index_select(1, group_of_column))


class QUANTO_INT4(AWQ_INT4):
    """value = code * scale + zero; the tensors are those of `W4A16`, `scale_2` has minus quanto's
    shifts."""

    label = "quanto int4"
    group = 128


class QUANTO_INT2(QUANTO_INT4):
    """The same with codes of 2 bits."""

    label = "quanto int2"
    bits = 2

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        return split_stream(codes, cls.bits).float()


class NVFP4_QUOTIENT(NVFP4_LOW):
    """value = float of a code * (scale / scale_2): nvfp4 of compressed-tensors.

    The tensors are those of `NVFP4_ROWS`.
    """

    of_host = False
    label = "nvfp4"

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> Terms:
        terms = super().terms(codes, scale, torch.ones_like(scale_2))
        return Terms(terms.codes, terms.scales / scale_2.view(-1, 1, 1))


def integer_family(bits: int, side_dtype: torch.dtype, has_zeros: bool = False,
                   is_ordered: bool = False) -> type[Integers]:
    """Returns the family of weights of integers.

    Args:
        bits: one of `BITS`.
        side_dtype: of the scales, one of `SIDE_DTYPES`.
        has_zeros: whether groups have zeros.
        is_ordered: whether each column names its group.
    """
    family: Any = FAMILIES[_name(bits, side_dtype, has_zeros, is_ordered)]
    return family


def quanto_family(bits: int, side_dtype: torch.dtype) -> type[RowFormat]:
    """Returns the family of optimum-quanto's weights of 2 or 4 bits."""
    return FAMILIES[f"QUANTO_INT{bits}{SIDE_DTYPES[side_dtype]}"]


def _name(bits: int, side_dtype: torch.dtype, has_zeros: bool, is_ordered: bool) -> str:
    base = "UINT" if has_zeros else "INT"
    return f"{base}{bits}_GROUPED{'_ORDERED' if is_ordered else ''}{SIDE_DTYPES[side_dtype]}"


def _define_families():
    for side_dtype, ending in SIDE_DTYPES.items():
        for bits in BITS:
            for has_zeros in (False, True):
                for base in (Integers, OrderedIntegers):
                    name = _name(bits, side_dtype, has_zeros, base is OrderedIntegers)
                    type(name, (base,), {"bits": bits, "side_dtype": side_dtype,
                                         "has_zeros": has_zeros, "label": f"int{bits} in groups"})
        for base in (QUANTO_INT4, QUANTO_INT2):
            if ending:
                type(f"{base.__name__}{ending}", (base,), {"side_dtype": side_dtype})


_define_families()
