"""Makes packed tensors of integers, scales and zeros, in whatever way a quantiser stored them."""
from typing import Any

import torch

from ...ops.formats.bits import split_stream
from ...ops.formats.comfy_quant import INT8_ROWS
from ...ops.formats.integers import BITS, ENDINGS, integer_family, zero_bits
from ...ops.formats.row_layout import RowFamily
from ...ops.tensor.packed_layout import packed_rows
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import WeightFile
from .comfy_quant_formats import FP8
from .parts import FLOATS, Part, PartError

FAMILY_OF_BYTES: dict[torch.dtype, RowFamily] = {torch.int8: INT8_ROWS, **FP8}
COLUMNS_TOGETHER = {4: 2, 8: 1}  # bits -> columns of a stream that are read together; 8 of others
SCALES = tuple(ENDINGS)  # dtypes of the scales of integers
E8M0 = (torch.uint8, *(dtype for dtype in FLOATS if dtype.itemsize == 1 and "e8m0" in str(dtype)))
CODES_OF_ROWS = Part("(N, K, L...)", tuple(FAMILY_OF_BYTES))  # of `pack_rows`, and their scales
SCALES_OF_ROWS = Part("1 or (N, 1...)", FLOATS)


def pack_integers(codes: torch.Tensor, columns: int, bits: int, scales: torch.Tensor,
                  zeros: torch.Tensor | None = None,
                  groups: torch.Tensor | None = None) -> PackedTensor:
    """Makes a packed tensor of (N, K).

    Args:
        codes: uint8 (N, K * bits / 8), contiguous, rows of a stream, the lowest bit first.
        columns: K.
        bits: of a code.
        scales: (N, G), of `SCALES`.
        zeros: uint8 (N, G); None where all are half the range of the codes. They are left out
            where they are.
        groups: the group of each column, integers (K,); None where each group is K / G columns.

    Raises:
        PartError: the scales do not fit the columns.
    """
    rows, count = scales.shape
    if groups is None and columns % count:
        raise PartError(f"its {count} groups do not divide its {columns} columns")
    if groups is not None:
        if groups.min() < 0 or groups.max() >= count or count > torch.iinfo(torch.int16).max:
            raise PartError(f"its columns do not name one of its {count} groups each")
        if columns % count == 0 and torch.equal(
                groups.long(), torch.arange(columns) // (columns // count)):
            groups = None
    if zeros is not None and bool((zeros == 1 << bits - 1).all()):
        zeros = None
    family = integer_family(bits, scales.dtype, zeros is not None, groups is not None)
    size = count if groups is not None else columns // count
    tensors = {"scale": scales}
    if zeros is not None:
        width = zero_bits(bits)
        padded = torch.nn.functional.pad(zeros, (0, -count % (8 // width)))
        tensors["zero"] = join_codes(padded.contiguous(), width)
    if groups is not None:
        tensors["group_of_column"] = groups.to(torch.int16)
    return packed_rows(family, codes, (rows, columns), (size,), **tensors)


def check_columns(columns: int, bits: int):
    """Raises PartError if rows of a stream do not end with codes that are read together."""
    together = COLUMNS_TOGETHER.get(bits, 8)
    if columns % together:
        raise PartError(f"it has {columns} columns of {bits} bits a value, expected a multiple of"
                        f" {together}", "Get another conversion.")


def pack_rows(codes: torch.Tensor, scale: torch.Tensor) -> PackedTensor:
    """Makes a packed tensor of bytes with a scale for each row, or with one.

    Args:
        codes: int8 or fp8 (N, ...).
        scale: float of N numbers, or of one.
    """
    return packed_rows(FAMILY_OF_BYTES[codes.dtype], codes, codes.shape,
                       scale=scale.float().flatten().expand(len(codes)))


def pack_nvfp4(family: RowFamily, codes: torch.Tensor, scale: torch.Tensor,
               of_tensor: torch.Tensor) -> PackedTensor:
    """Makes a packed tensor of 4-bit floats.

    Args:
        family: of nvfp4.
        codes, scale, of_tensor: as `nvfp4_parts` says.
    """
    rows, columns = len(codes), codes.shape[1] * 2
    return packed_rows(family, codes, (rows, columns), scale=scale,
                       row_scale=of_tensor.float().flatten().expand(rows))


def nvfp4_parts(codes: str, scale: str, of_tensor: str, *other_names: str) -> dict[str, Part]:
    """Returns the parts of 4-bit floats under these names; the scale may have others."""
    return {codes: Part("(N, K / 2)", (torch.uint8,)),
            scale: Part("(N, K / 16)", (torch.float8_e4m3fn,), other_names=other_names),
            of_tensor: Part("1", FLOATS)}


def split_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the fields of rows of int32 words as uint8, the lowest bit first.

    Args:
        words: int32 (R, W).
        bits: of a field, one of `BITS`.

    Returns:
        (R, W * 32 // bits).
    """
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack([data & 15, data >> 4], -1).view(len(data), -1)
    return split_stream(data, bits).to(torch.uint8)


def split_parts(stored: torch.Tensor, bits: int, is_high_first: bool = False) -> torch.Tensor:
    """Returns the codes of bytes that each have one of several parts, which lie below each other.

    Args:
        stored: uint8 (R, ...).
        bits: of a code: 2, 4 or 8.
        is_high_first: whether the first part is in the highest bits of the bytes.

    Returns:
        uint8 (R * 8 / bits, ...).
    """
    shifts = range(0, 8, bits)
    parts = [stored >> shift & (1 << bits) - 1
             for shift in (reversed(shifts) if is_high_first else shifts)]
    return torch.cat(parts)


def join_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns rows of codes as a stream, the lowest bit first; inverts `split_words` on bytes.

    Args:
        codes: uint8 (R, K), K * bits a multiple of 8.
        bits: one of `BITS`; with those that do not divide 8, K is a multiple of 8.

    Returns:
        uint8 (R, K * bits / 8).
    """
    if bits == 8:
        return codes.contiguous()
    if 8 % bits:
        eights = codes.view(len(codes), -1, 8)
        words = eights[..., 0].long()
        for index in range(1, 8):
            words |= eights[..., index].long() << index * bits
        return words.unsqueeze(-1).view(torch.uint8)[..., :bits].reshape(len(codes), -1)
    fields = codes.view(len(codes), -1, 8 // bits)
    packed = fields[..., 0].clone()
    for index in range(1, 8 // bits):
        packed |= fields[..., index] << index * bits
    return packed


def settings_of_groups(file: WeightFile) -> list[dict[str, Any]]:
    """Returns what the config of a folder says about the weights of each of its groups of layers,
    as compressed-tensors and ModelOpt write it."""
    groups = file.quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    return [settings for settings in weights if isinstance(settings, dict)]


def known_bits(bits: float) -> int:
    """Returns the bits of a code. Raises PartError if no weights of so many bits are read."""
    if bits not in BITS:
        raise PartError(f"it has {bits:g} bits a value, expected {', '.join(map(str, BITS))}")
    return int(bits)
