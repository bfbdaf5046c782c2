"""Reads weights that torchao packed and wrote to safetensors.

The header has, under the name of a weight `L.weight`, JSON with its type, and the file its parts:

| type | `L._weight_qdata` | `L._weight_scale` | `L._weight_zero_point` |
|---|---|---|---|
| Int8Tensor | int8 (N, K) | (N, 1) | int8 (N, 1) |
| Float8Tensor | fp8 (N, K) | (N, 1) or (1, 1) | |
| IntxUnpackedToInt8Tensor | int8 (N, K) | (N, K / g) | int8 (N, K / g) |

Each becomes one packed tensor `L.weight`: value = (code - zero) * scale. Integers of the last type
are packed into as few bits as hold them. Other types have layouts of one GPU's kernels.

Source: torchao 0.18.0 `prototype/safetensors`, `quantization/quantize_`.
"""
from collections.abc import Mapping
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ..files.container import WeightFile, describe, safe_repr
from .base import PartError, Parts, of_layers, part
from .integers import join_codes, pack_integers, pack_rows

CODES, SCALE, ZEROS = PARTS = "_weight_qdata", "_weight_scale", "_weight_zero_point"
ROWS, INTEGERS = ("Int8Tensor", "Float8Tensor"), "IntxUnpackedToInt8Tensor"


def _settings(text: Any) -> Mapping[str, Any]:
    """Returns what the header says about a weight."""
    try:
        settings = read_json(text.encode())
    except (AttributeError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise PartError("the header of its file does not say its type")
    return settings


def read_weight(file: WeightFile, layer: str, parts: Parts) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    settings = _settings(file.metadata.get(f"{layer}.weight"))
    type_name, codes, scale = settings.get("_type"), parts[CODES], part(parts, SCALE)
    zeros = parts.get(ZEROS)
    if type_name == ROWS[1]:
        return pack_rows(codes, scale)
    if type_name != INTEGERS and type_name != ROWS[0]:
        raise PartError(f"it is a {safe_repr(type_name)}, expected {', '.join(ROWS)} or {INTEGERS}")
    if zeros is None and type_name == INTEGERS:
        raise PartError(f"it has no {ZEROS}")
    if zeros is None:
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
    if (codes.dtype, codes.ndim, scale.ndim, zeros.dtype) != (torch.int8, 2, 2, torch.int8) or (
            zeros.shape != scale.shape or len(scale) != len(codes) or not codes.numel()):
        raise PartError(f"it has {describe(codes)} codes, {describe(scale)} scales and"
                        f" {describe(zeros)} zeros, expected int8 (N, K) codes with a scale and a"
                        " zero for each group")
    if type_name == ROWS[0] and scale.shape[1] == 1 and not zeros.any():
        return pack_rows(codes, scale)
    bits = _bits(codes, zeros)
    half = 1 << bits - 1
    unsigned = (codes.view(torch.uint8) + half) & (1 << bits) - 1
    return pack_integers(join_codes(unsigned, bits), codes.shape[1], bits, scale,
                         (zeros.short() + half).to(torch.uint8))


def _bits(codes: torch.Tensor, zeros: torch.Tensor) -> int:
    """Returns the fewest bits that hold all codes and zeros."""
    # int8 has no 128, the negative of -128
    largest = max(-int(codes.min()), int(codes.max()) + 1, -int(zeros.min()), int(zeros.max()) + 1)
    return next(bits for bits in (2, 4, 8)
                if largest <= 1 << bits - 1 and codes.shape[1] * bits % 8 == 0)


QUANTIZER = of_layers("torchao", PARTS, {CODES: ()}, read_weight, {"torchao": "torchao"})
