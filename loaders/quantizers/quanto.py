"""Reads weights that optimum-quanto packed.

| in the file (layer `L`, weight (N, K)) | type |
|---|---|
| `L.weight._data` int8 or fp8 (N, ...), `L.weight._scale` (N, 1, ...) or () | qint8, qfloat8 |
| `L.weight._data._data` uint8, `L.weight._scale`, `L.weight._shift` (N * K / g, 1) | qint4, qint2 |

Each becomes one packed tensor `L.weight`. value = code * scale, or code * scale - shift. qint4 and
qint2 are matrices of (N * K / g, g) codes, which are cut into 2 or 4 parts below each other, whose
codes share bytes, the first part in the lowest bits. The file does not say N, so the layer needs a
bias. `L.input_scale` and `L.output_scale` say nothing about the weight.

Source: optimum-quanto 0.2.7 `tensor/packed.py`, `tensor/weights/qbits.py`.
"""
import math

import torch

from ...ops.formats.integers import ENDINGS, quanto_family
from ...ops.tensor.packed_layout import packed_rows
from ..files.container import WeightFile, describe
from .base import PartError, Parts, of_layers, part
from .integers import join_codes, pack_rows

CODES, PACKED, SCALE, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
PARTS = (CODES, PACKED, SCALE, SHIFT, "input_scale", "output_scale")


def read_weight(file: WeightFile, layer: str, parts: Parts) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    settled = str(file.quantization.get("weights_dtype", file.quantization.get("weights", "")))
    if CODES in parts:
        if settled == "int8" and parts[CODES].dtype != torch.int8:
            raise PartError(f"its codes are {describe(parts[CODES])}, expected int8 by its config")
        return pack_rows(parts[CODES], part(parts, SCALE))
    codes, scale, shift = (part(parts, name) for name in (PACKED, SCALE, SHIFT))
    groups = scale.numel()
    if (codes.ndim, codes.dtype) != (2, torch.uint8) or not codes.numel() or (
            shift.numel() != groups or shift.dtype != scale.dtype
            or scale.dtype not in ENDINGS):
        raise PartError(f"it has {describe(codes)} codes, {describe(scale)} scales and"
                        f" {describe(shift)} shifts, expected uint8 codes with a scale and a shift"
                        " for each group")
    bits = next((bits for bits in (4, 2) if len(codes) == -(-groups * bits // 8)), None)
    if bits is None or codes.shape[1] * bits % 8 or (
            settled in ("int2", "int4") and settled != f"int{bits}"):
        raise PartError(f"it has {describe(codes)} codes for {groups} groups, expected 2 or 4 bits"
                        " a value, and whole bytes for each group")
    bias = file.entries.get(f"{layer}.bias")
    if bias is None:
        raise PartError("it has no bias, without which its file does not say how many rows it has;"
                        " qint8 and qfloat8 need none")
    rows, group = math.prod(bias.shape), codes.shape[1]
    columns = groups * group // max(1, rows)
    if len(bias.shape) != 1 or not rows or rows * columns != groups * group or columns % group:
        raise PartError(f"its {groups} groups of {group} values are no whole rows of the {rows}"
                        " that its bias has")
    packed = join_codes(_codes(codes, groups, bits), bits)
    return packed_rows(quanto_family(bits, scale.dtype), packed, (rows, columns), (group,),
                       scale=scale, minimum=-shift)


def _codes(stored: torch.Tensor, groups: int, bits: int) -> torch.Tensor:
    """Returns the codes (groups, g), uint8, of bytes whose parts lie below each other."""
    mask = (1 << bits) - 1
    parts = [stored >> shift & mask for shift in range(0, 8, bits)]
    return torch.cat(parts)[:groups]


QUANTIZER = of_layers("quanto", PARTS, {CODES: (), PACKED: ()}, read_weight, {"quanto": "quanto"})
