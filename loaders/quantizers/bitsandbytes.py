"""Reads weights that bitsandbytes packed: several tensors in the file, one packed tensor in memory.

A 4-bit weight `X` has its codes in `X`, which has any name and keeps it; an 8-bit weight is that of
a layer `L`. What else the file has of them is in `PARTS`. The packed tensors have the shapes of the
dense model.
"""
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.bounded_json import read_json
from ...ops.formats.bnb_4bit import FP4, NF4, Codebook4Bit
from ...ops.formats.bnb_int8 import INT8
from ...ops.tensor.packed_layout import packed_rows, packed_tensor
from ..container.weight_file import COUNTABLE, WeightFile, safe_repr
from ..refusals.unsupported_quantizers import GET_OTHER_FORMAT
from .base import HeaderOf, Layer, Quantizer, scaled_layers
from .comfy_quant_marks import MARK
from .parts import FLOATS, Part, PartError

QUANT_TYPES: dict[str, Codebook4Bit] = {"nf4": NF4.of(), "fp4": FP4.of()}
# bitsandbytes 0.50 `functional.quantize_4bit`
BLOCK_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

QUANT_STATE = re.compile(
    r"(?P<weight>.+)(?<!absmax)(?<!quant_map)(?<!SCB)\.quant_state\.bitsandbytes__(?P<quant_type>\w+)"
)
INT8_SCALES = re.compile(r"(?P<layer>.+?)(\.weight)?\.SCB")
# End of the name of a tensor that belongs to a 4-bit weight.
PART = re.compile(r"\.((nested_)?absmax|(nested_)?quant_map|quant_state\.\w+)$")

STATES = tuple(f"quant_state.bitsandbytes__{quant_type}" for quant_type in QUANT_TYPES)
STATE, NESTED = STATES[0], "4 bits with quantized scales"
_CODES = {
    # `quant_storage` is the dtype of the codes
    "": Part("C", (torch.uint8, torch.bfloat16, torch.float16, torch.float32)),
    STATE: Part("S", (torch.uint8,), other_names=STATES[1:]), "quant_map": Part("(16,)", FLOATS),
}
PARTS = {
    "4 bits": _CODES | {"absmax": Part("B", FLOATS)},
    NESTED: _CODES | {
        "absmax": Part("B", (torch.uint8,)), "nested_absmax": Part("D", FLOATS),
        "nested_quant_map": Part("256", FLOATS)},
    "int8": {
        "weight": Part("(N, K)", (torch.int8,)),
        "SCB": Part("N", FLOATS, other_names=("weight.SCB",)),
        "weight_format": Part("1", optional="weight_format",
                              other_names=("weight.weight_format",))},
}


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the names of 4-bit weights, and the layers of int8 weights.

    A weight has a quant_state, or lacks it and has the other parts or codes as no others are.
    """
    stated = set()
    for name in names:
        if match := QUANT_STATE.fullmatch(name):
            stated.add(match["weight"])
            yield match["weight"]
        elif match := INT8_SCALES.fullmatch(name):
            yield match["layer"]
    scaled = {f"{layer}.weight" for layer in scaled_layers(names, ("scale", "weight_scale"))}
    for name in names:
        layer = name.removesuffix(".weight")
        is_part = f"{name}.absmax" in names and f"{name}.quant_map" in names
        if name not in stated and (is_part or (layer != name and f"{layer}{MARK}" not in names
                                   and name not in scaled and _is_4bit(header_of(name)))):
            yield name


def _is_4bit(header: Any) -> bool:
    """Returns whether a tensor has the shape in which bitsandbytes alone stores codes."""
    return header.dtype == torch.uint8 and tuple(header.shape[1:]) == (1,)


def formats_in(file: WeightFile) -> dict[str, str]:
    """Returns name -> format of each weight; the parts of a bitsandbytes weight count as one."""
    matches = filter(None, map(QUANT_STATE.fullmatch, file.entries))
    packed = {match["weight"]: match["quant_type"].upper() for match in matches}
    return {
        name: packed.get(name, entry.format)
        for name, entry in file.entries.items()
        if PART.sub("", name) not in packed or name in packed
    }


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout."""
    if "SCB" in layer.parts:
        if f"{layer.name}{MARK}" in layer.file.entries:
            raise PartError(f"it has both {safe_repr(layer.names['SCB'])} and"
                            f" {safe_repr(layer.name + MARK)}")
        return "int8"
    if STATE not in layer.parts:
        states = filter(None, map(QUANT_STATE.fullmatch, layer.file.entries))
        for state in states:
            if state["weight"] == layer.name:
                raise PartError(f"its quant_type is {safe_repr(state['quant_type'])}, expected"
                                f" {' or '.join(QUANT_TYPES)}", GET_OTHER_FORMAT)
    absmax = layer.parts.get("absmax")
    return NESTED if absmax is not None and absmax.dtype == torch.uint8 else "4 bits"


def read(layer: Layer) -> Mapping[str, torch.Tensor]:
    """Returns the weight of a layer, packed, from its parts."""
    if layer.layout == "int8":
        return {f"{layer.name}.weight": _int8(layer.parts)}
    quant_type, parts = layer.names[STATE].rpartition("__")[2], layer.parts
    state = _quant_state(layer, quant_type)
    packed_format = QUANT_TYPES[quant_type].of_block_length(state["blocksize"])
    shape, stored = tuple(state["shape"]), parts[""]
    values = math.prod(shape)
    codes = stored.contiguous().view(-1).view(torch.uint8)
    needed, blocks = -(-values // 2), -(-values // packed_format.block_length)
    if not needed <= len(codes) < needed + stored.dtype.itemsize:
        raise PartError(f"its quant_state gives it the shape {safe_repr(state['shape'])}, for which"
                        f" {needed} bytes of codes are expected, but it has {len(codes)}")
    if layer.sizes["B"] != blocks:
        raise PartError(f"its absmax has {layer.sizes['B']} scales, but its shape"
                        f" {safe_repr(state['shape'])} has {blocks} blocks of {state['blocksize']}")
    absmax = parts["absmax"].view(-1)
    absmax = _nested(layer, state) if layer.layout == NESTED else absmax.float()
    expected = torch.tensor(packed_format.codebook, dtype=torch.float32)
    if not torch.equal(parts["quant_map"].float(), expected):
        raise PartError(f"its quant_map is not the codebook of {quant_type}")
    return {layer.name: packed_tensor(packed_format, codes[:needed], shape, scale=absmax)}


def _quant_state(layer: Layer, quant_type: str) -> dict:
    """Returns the checked fields of a layer's quant_state."""
    title = safe_repr(layer.names[STATE])
    try:
        state = read_json(bytes(layer.parts[STATE].view(-1).tolist()))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise PartError(f"{title} is not a JSON object")
    missing = [field for field in ("quant_type", "blocksize", "shape") if field not in state]
    if missing:
        raise PartError(f"{title} has no {' and no '.join(missing)}")
    if state["quant_type"] != quant_type:
        raise PartError(f"{title} contains quant_type {safe_repr(state['quant_type'])}")
    if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_LENGTHS:
        raise PartError(f"{title} has blocksize {safe_repr(state['blocksize'])}; bitsandbytes"
                        f" writes {', '.join(map(str, BLOCK_LENGTHS))}")
    shape = state["shape"]
    if (not isinstance(shape, list) or not shape
            or not all(type(size) is int and size > 0 for size in shape)
            or math.prod(shape) > COUNTABLE):
        raise PartError(f"{title} has shape {safe_repr(shape)}, which is not a weight's")
    return state


def _nested(layer: Layer, state: Mapping[str, Any]) -> torch.Tensor:
    """Returns the scales of a 4-bit weight that are quantised too, float32 (B,)."""
    absmax, scales, codebook = (
        layer.parts[name].view(-1) for name in ("absmax", "nested_absmax", "nested_quant_map"))
    length, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if (type(length) is not int or length < 1 or type(offset) is not float
            or not math.isfinite(offset)):
        raise PartError("its absmax is quantized, but its quant_state gives nested_blocksize"
                        f" {safe_repr(length)} and nested_offset {safe_repr(offset)}")
    if len(scales) != -(-len(absmax) // length):
        raise PartError(f"it has {len(scales)} nested_absmax for {len(absmax)} scales in blocks of"
                        f" {length}, expected {-(-len(absmax) // length)}")
    length = min(length, len(absmax))
    # bitsandbytes 0.50 `functional.dequantize_4bit`: each step rounds to float32.
    return (codebook.float()[absmax.int()] * scales.float().repeat_interleave(length)[:len(absmax)]
            ).add_(torch.tensor(offset, dtype=torch.float32))


def _int8(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tiles = parts.get("weight_format")
    if tiles is not None and tiles.any():
        raise PartError("it is stored in tiles for one GPU generation (its weight_format is not 0)",
                        "Get a conversion made with bitsandbytes 0.45 or newer.")
    codes = parts["weight"]
    return packed_rows(INT8, codes, codes.shape, scale=parts["SCB"].view(-1).float() / 127)


QUANTIZER = Quantizer(
    name="bitsandbytes", methods={"bitsandbytes": "bitsandbytes (4-bit NF4 and FP4, int8)"},
    find=find, layouts=PARTS, layout=layout, read=read, leftovers=re.compile(
        r"\.((nested_)?absmax|(nested_)?quant_map|quant_state(\..*)?|SCB|weight_format)$"))
