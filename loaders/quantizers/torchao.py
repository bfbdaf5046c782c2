"""Reads weights that torchao packed and wrote to safetensors.

The header has, under the name of a weight `L.weight`, JSON with its type, and the file the `PARTS`
of that type, which become one packed tensor: value = (code - zero) * scale. Integers of the last
type are packed into as few bits as hold them. Other types have layouts of one GPU's kernels.

Source: torchao 0.18.0 `prototype/safetensors`, `quantization/quantize_`.
"""
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ..container.weight_file import safe_repr
from .base import Layer, Quantizer, layers_with
from .integers import (
    CODES_OF_ROWS,
    COLUMNS_TOGETHER,
    SCALES,
    SCALES_OF_ROWS,
    join_codes,
    pack_integers,
    pack_rows,
)
from .parts import Part, PartError

CODES, SCALE, ZEROS = "_weight_qdata", "_weight_scale", "_weight_zero_point"
ROWS, FLOAT8, INTEGERS = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"
_CODES = {CODES: Part("(N, K)", (torch.int8,)), SCALE: Part("(N, G)", SCALES)}
PARTS = {
    ROWS: _CODES | {ZEROS: Part("(N, G)", (torch.int8,), ZEROS)},
    FLOAT8: {CODES: CODES_OF_ROWS, SCALE: SCALES_OF_ROWS, ZEROS: Part("", optional=ZEROS)},
    INTEGERS: _CODES | {ZEROS: Part("(N, G)", (torch.int8,))},
}


def _settings(text: Any) -> Mapping[str, Any]:
    """Returns what the header says about a weight."""
    try:
        settings = read_json(text.encode())
    except (AttributeError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise PartError("the header of its file does not say its type")
    return settings


def layout(layer: Layer) -> str:
    """Returns the type of a layer's weight."""
    name = _settings(layer.file.metadata.get(f"{layer.name}.weight")).get("_type")
    if not isinstance(name, str) or name not in PARTS:
        raise PartError(f"it is a {safe_repr(name)}, expected {', '.join(PARTS)}")
    return name


def read(layer: Layer) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    codes, scale, zeros = layer.parts[CODES], layer.parts[SCALE], layer.parts.get(ZEROS)
    if layer.layout == FLOAT8:
        return pack_rows(codes, scale)
    if zeros is None:
        zeros = torch.zeros(scale.shape, dtype=torch.int8)
    if layer.layout == ROWS and scale.shape[1] == 1 and not zeros.any():
        return pack_rows(codes, scale)
    bits = _bits(codes, zeros)
    half = 1 << bits - 1
    unsigned = (codes.view(torch.uint8) + half) & (1 << bits) - 1
    return pack_integers(join_codes(unsigned, bits), codes.shape[1], bits, scale,
                         (zeros.short() + half).to(torch.uint8))


def _bits(codes: torch.Tensor, zeros: torch.Tensor) -> int:
    """Returns the fewest bits that hold all codes and zeros, and rows of the codes' columns."""
    # int8 has no 128, the negative of -128
    largest = max(-int(codes.min()), int(codes.max()) + 1, -int(zeros.min()), int(zeros.max()) + 1)
    return next(bits for bits in (2, 4, 8) if largest <= 1 << bits - 1
                and codes.shape[1] % COLUMNS_TOGETHER.get(bits, 8) == 0)


QUANTIZER = Quantizer(
    name="torchao", methods={"torchao": "torchao"}, find=layers_with([CODES]), layouts=PARTS,
    layout=layout, read=read, is_uniform=True,
    leftovers=re.compile(r"\._weight_(qdata|scale|zero_point)$"))
