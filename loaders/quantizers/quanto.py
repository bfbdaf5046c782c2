"""Reads weights that optimum-quanto packed.

`PARTS` of a layer of (N, K) become one packed tensor: value = code * scale, or code * scale -
shift. qint4 and qint2 are matrices of (N * K / L, L) codes, G rows, which are cut into 2 or 4 parts
below each other, whose codes share bytes, the first part in the lowest bits. The file does not say
N: it is the length of the bias. A layer without one has as many columns, or as many rows, as the
norm of its block has numbers, by the name of the layer (`WIDE_INPUTS`, `WIDE_OUTPUTS`).
`input_scale` and `output_scale` say nothing about the weight.

Source: optimum-quanto 0.2.7 `tensor/packed.py`, `tensor/weights/qbits.py`.
"""
import contextlib
import re
from collections.abc import Iterator, Mapping

import torch

from ...ops.formats.integers import family_with_minimum
from ...ops.tensor.packed_layout import packed_rows
from ..container.weight_file import WeightFile
from .base import Layer, Quantizer, Read, layers_with
from .integers import (
    CODES_OF_ROWS,
    SCALES,
    SCALES_OF_ROWS,
    check_columns,
    join_codes,
    pack_rows,
    split_parts,
)
from .parts import Part, PartError

CODES, PACKED, SCALE, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
INPUT_PARTS = {name: Part("", optional=name) for name in ("input_scale", "output_scale")}
PARTS = {
    "qint8 or qfloat8": {CODES: CODES_OF_ROWS, SCALE: SCALES_OF_ROWS, **INPUT_PARTS},
    "qint4 or qint2": {SCALE: Part("G", SCALES), SHIFT: Part("G", SCALES),
                       PACKED: Part("(C, L)", (torch.uint8,)), **INPUT_PARTS},
}
# layers whose input, or output, is what the norms of their block take: of T5, of decoders, of
# diffusers' attention and of feed-forward layers
WIDE_INPUTS = re.compile(
    r"(^|\.)(q|k|v|wi(_[01])?|[qkv]_proj|qkv_proj|gate_proj|up_proj|gate_up_proj"
    r"|to_q|(attn|attn1|attention|self_attn)\.to_[kv]|to_qkv|qkv|w1|w3)$")
WIDE_OUTPUTS = re.compile(
    r"(^|\.)(o|wo|o_proj|down_proj|to_out(\.0)?|attention\.out|attn2\.to_[kv]|w2)$")
NORM = re.compile(r"(?!.*(?<![^_])[qkv](_|$)).*norm.*")  # of what comes in, not of q, k or v
ANCESTORS = 4  # of a layer, in which the norm of its block is looked for


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its codes."""
    return "qint8 or qfloat8" if CODES in layer.parts else "qint4 or qint2"


@contextlib.contextmanager
def session(file: WeightFile, tensors: Mapping[str, torch.Tensor]) -> Iterator[Read]:
    """Gives what reads a layer, with the widths of the norms of all blocks."""
    widths: dict[str, set[int]] = {}
    for name, entry in file.entries.items():
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if len(entry.shape) == 1 and name.endswith(".weight") and NORM.fullmatch(norm):
            widths.setdefault(block, set()).add(entry.shape[0])
    yield lambda layer: read(layer, widths)


def read(layer: Layer, widths: Mapping[str, set[int]]) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts.

    Args:
        layer: with its parts.
        widths: name of a block -> the lengths of its norms.
    """
    config, parts, sizes = layer.file.quantization, layer.parts, layer.sizes
    settled = str(config.get("weights_dtype", config.get("weights", "")))
    if CODES in parts:
        if settled == "int8" and parts[CODES].dtype != torch.int8:
            raise PartError("its codes are not int8, though its config says so")
        return pack_rows(parts[CODES], parts[SCALE])
    codes, scale, shift = parts[PACKED], parts[SCALE], parts[SHIFT]
    if shift.dtype != scale.dtype:
        raise PartError(f"its scales are {scale.dtype} and its shifts {shift.dtype}, expected the"
                        " same")
    groups, group = sizes["G"], sizes["L"]
    bits = next((bits for bits in (4, 2) if len(codes) == -(-groups * bits // 8)), None)
    if bits is None or group * bits % 8 or (
            settled in ("int2", "int4") and settled != f"int{bits}"):
        raise PartError(f"it has {len(codes)} rows of {group} codes for {groups} groups, expected 2"
                        " or 4 bits a value, and whole bytes for each group")
    rows, source = _rows(layer, groups * group, widths)
    columns = groups * group // max(1, rows)
    if rows * columns != groups * group or columns % group:
        raise PartError(f"its {groups} groups of {group} values are not whole rows of {source}")
    check_columns(columns, bits)
    packed = join_codes(split_parts(codes, bits)[:groups], bits)
    family = family_with_minimum("quanto", bits, scale.dtype)
    return packed_rows(family, packed, (rows, columns), (group,),
                       scale=scale, minimum=-shift)


def _rows(layer: Layer, values: int, widths: Mapping[str, set[int]]) -> tuple[int, str]:
    """Returns how many rows a layer has, and what says so, for people."""
    bias = layer.file.entries.get(f"{layer.name}.bias")
    if bias is not None:
        return bias.shape[0] if len(bias.shape) == 1 else 0, f"its bias of {bias.shape}"
    is_input, is_output = WIDE_INPUTS.search(layer.name), WIDE_OUTPUTS.search(layer.name)
    block, lengths = layer.name, set[int]()
    for _ in range(ANCESTORS):
        block = block.rpartition(".")[0]
        lengths = lengths or widths.get(block, lengths)
    if len(lengths) != 1 or not (is_input or is_output):
        raise PartError("it has no bias, without which its file does not say how many rows it has,"
                        " and no norm next to it that does; qint8 and qfloat8 need none")
    width, = lengths
    source = f"the {width} numbers of the norm next to it"
    return width if is_output else values // max(1, width), source


QUANTIZER = Quantizer(
    name="quanto", methods={"quanto": "quanto"}, find=layers_with([CODES], [PACKED]),
    layouts=PARTS, layout=layout, session=session, is_uniform=True,
    leftovers=re.compile(r"\.weight\._(data|scale|shift|packed)$"))
