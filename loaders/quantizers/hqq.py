"""Reads weights that HQQ packed, as its own package and transformers store them in safetensors.

`PARTS` of a layer of (N, K) become one packed tensor: value = (code - zero) * scale, for groups of
neighbouring columns. Codes are a matrix of (N * K / L, L), G rows, which is cut into as many parts
below each other as codes share a byte, the first part in the highest bits. The parts beside codes,
scales and zeros are the arguments of HQQ, each a tensor.

Source: hqq 0.2.8 `core/quantize.py`, `core/bitpack.py`, `core/utils.py`.
"""
import re

import torch

from ...ops.formats.integers import HQQ_BITS, family_with_minimum
from ...ops.tensor.packed_layout import packed_rows
from .base import Layer, Quantizer, layers_with
from .integers import SCALES, check_columns, join_codes, split_parts
from .parts import REAL, WHOLE, Part, PartError

CODES, SCALE, ZERO, SHAPE = "W_q", "scale", "zero", "shape"
BITS, GROUP, AXIS = "nbits", "group_size", "axis"
PACKED_AS_BYTES = (5, 6)  # bits of a code that has a byte
UNUSED = ("packing", "view_as_float", "unpack_view_dtype", "compute_dtype", "quant_scale",
          "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config",
          "channel_wise", "optimize", "round_zero")
PARTS = {"HQQ": {
    SCALE: Part("G", SCALES), ZERO: Part("G", SCALES), CODES: Part("(C, L)", (torch.uint8,)),
    SHAPE: Part("2", WHOLE), BITS: Part("1", REAL), GROUP: Part("1", WHOLE), AXIS: Part("1", WHOLE),
    **{name: Part("", optional=name) for name in UNUSED}}}
ADVICE = "Quantize the model again with axis=1 and 4 or 8 bits, or get it in another format."


def read(layer: Layer) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    parts, groups, group = layer.parts, layer.sizes["G"], layer.sizes["L"]
    if parts[AXIS].item() != 1:
        raise PartError("its groups are of rows (axis 0), expected groups of columns (axis 1)",
                        ADVICE)
    stated = float(parts[BITS].item())
    if stated not in (*HQQ_BITS, *PACKED_AS_BYTES):
        raise PartError(f"it has {stated:g} bits a value, expected 2, 4, 5, 6 or 8", ADVICE)
    bits = 8 if stated in PACKED_AS_BYTES else int(stated)
    scale, zero = parts[SCALE], parts[ZERO]
    if scale.dtype != zero.dtype:
        raise PartError(f"its scales are {scale.dtype} and its zeros {zero.dtype}, expected the"
                        " same")
    rows, columns = (int(size) for size in parts[SHAPE].flatten().tolist())
    stored = groups * bits // 8
    if (min(rows, columns) < 1 or rows * columns != groups * group or columns % group
            or parts[GROUP].item() != group or len(parts[CODES]) != stored
            or groups * bits % 8):
        raise PartError(f"it has {len(parts[CODES])} rows of {group} codes of {stated:g} bits for"
                        f" {groups} groups of a weight of ({rows}, {columns}), expected {stored}"
                        " rows and whole groups of columns")
    check_columns(columns, bits)
    codes = split_parts(parts[CODES], bits, is_high_first=True)
    packed = join_codes(codes.view(rows, columns), bits)
    added = -(zero.float() * scale.float())
    family = family_with_minimum("HQQ", bits, scale.dtype)
    return packed_rows(family, packed, (rows, columns), (group,),
                       scale=scale, minimum=added)


QUANTIZER = Quantizer(
    name="HQQ", methods={"hqq": "HQQ"}, find=layers_with([CODES]), layouts=PARTS, read=read,
    leftovers=re.compile(r"\.W_q$"))
