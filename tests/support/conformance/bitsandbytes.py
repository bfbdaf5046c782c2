"""Weights that bitsandbytes itself writes, in 4 bits and in int8."""
import json

import pytest
import torch

from .base import Written, damaged, each, grid, weight

SHAPES = {
    "whole rows": (24, 256), "blocks cross rows": (10, 96), "a short last block": (7, 72),
    "less than a block": (3, 4)
}
STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
STATE = "weight.quant_state.bitsandbytes__nf4"


def text(string):
    return torch.tensor(list(string.encode()), dtype=torch.uint8)


def of_4bit(shape=(16, 64), nested=False, quant_type="nf4", block_length=64, storage=torch.uint8):
    bnb_files = pytest.importorskip("devtools.files.bnb_files", reason="bitsandbytes writes them")
    parts, values = bnb_files.quantised(weight(*shape), quant_type, block_length, nested, storage)
    return Written({f"weight{name}": part for name, part in parts.items()}, values,
                   held=None if nested else 1.05, whole_rows=shape[1] % block_length == 0)


def of_int8(scales="SCB"):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes writes them")
    codes, found, _ = functional.int8_vectorwise_quant(weight(8, 16).half())
    parts = {"weight": codes, scales: found}
    if scales == "SCB":
        parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return Written(parts, codes * (found / 127).view(-1, 1))


WRITERS = {
    **each("4 bits", of_4bit, *(
        {"quant_type": quant_type, "nested": nested, "block_length": block_length,
         "storage": storage, "shape": shape} for quant_type in ("nf4", "fp4")
        for nested in (False, True) for block_length in (64, 128, 4096) for storage in STORAGE
        for shape in SHAPES.values() if shape[0] * shape[1] % (2 * storage.itemsize) == 0)),
    "an odd number of codes": lambda: of_4bit((5, 45)),
    **grid("int8", of_int8, scales=["SCB", "weight.SCB"]),
}


def state(*without, **fields):
    """A change of the quant_state: without some fields, with others of another value."""
    def change(tensor):
        found = json.loads(bytes(tensor.tolist())) | fields
        return text(json.dumps({name: value for name, value in found.items()
                                if name not in without}))

    return change


def renamed(parts):
    """Of a quantiser that is not known."""
    return {name.replace("__nf4", "__nf3"): part for name, part in parts.items()}


def with_fp4(parts):
    return parts | {"weight.quant_state.bitsandbytes__fp4": state(quant_type="fp4")(parts[STATE])}


BAD = damaged(
    of_4bit,
    no_absmax=({"weight.absmax": None}, "it has no absmax, expected"),
    no_quant_map=({"weight.quant_map": None}, "it has no quant_map"),
    no_quant_state=({STATE: None}, "it has no quant_state.bitsandbytes__nf4, expected"),
    codes_alone=(lambda parts: {"weight": parts["weight"]}, "it has no quant_state"),
    no_codes=({"weight": None}, "it has no codes, expected"),
    absmax_too_short=({"weight.absmax": torch.rand(15)},
                      "its absmax has 15 scales, .* has 16 blocks of 64"),
    absmax_too_long=({"weight.absmax": torch.rand(17)}, "its absmax has 17 scales"),
    absmax_of_integers=({"weight.absmax": torch.arange(16)},
                        r"it has absmax of int64 \(16,\), expected B numbers of any float"),
    another_codebook=({"weight.quant_map": torch.rand(16)},
                      "its quant_map is not the codebook of nf4"),
    codebook_of_fp4=(
        {"weight.quant_map": lambda _: of_4bit(quant_type="fp4").parts["weight.quant_map"]},
        "not the codebook of nf4"),
    a_short_codebook=({"weight.quant_map": torch.rand(8)},
                      r"it has quant_map of float32 \(8,\), expected \(16,\) of any float"),
    not_JSON=({STATE: text("{'a': 1")}, f": 'L.{STATE}' is not a JSON object"),
    not_text=({STATE: torch.tensor([255, 254], dtype=torch.uint8)}, "not a JSON object"),
    deep_JSON=({STATE: text("[" * 100000)}, "not a JSON object"),
    a_JSON_list=({STATE: text("[]")}, "not a JSON object"),
    an_empty_quant_state=({STATE: torch.zeros(0, dtype=torch.uint8)},
                          r"it has quant_state.bitsandbytes__nf4 of uint8 \(0,\)"),
    no_shape=({STATE: state("shape")}, f": 'L.{STATE}' has no shape"),
    no_block_size=({STATE: state("blocksize", "shape")}, "has no blocksize and no shape"),
    no_quant_type=({STATE: state("quant_type")}, "has no quant_type"),
    a_larger_shape=(
        {STATE: state(shape=[16, 128])},
        r"the shape \[16, 128\], for which 1024 bytes of codes are expected, but it has 512"),
    a_smaller_shape=({STATE: state(shape=[16, 62])},
                     "496 bytes of codes are expected, but it has 512"),
    a_shape_of_null=({STATE: state(shape=None)}, "has shape None"),
    an_empty_shape=({STATE: state(shape=[])}, r"has shape \[\]"),
    a_negative_shape=({STATE: state(shape=[-16, -64])}, "has shape"),
    a_shape_of_floats=({STATE: state(shape=[16.0, 64])}, "has shape"),
    a_shape_of_text=({STATE: state(shape="16x64")}, "has shape '16x64'"),
    an_immense_shape=({STATE: state(shape=[10**4000, 10**4000])}, "has shape"),
    another_block_size=({STATE: state(blocksize=128)}, "has 16 scales, .* has 8 blocks of 128"),
    an_odd_block_size=({STATE: state(blocksize=65)},
                       "has blocksize 65; bitsandbytes writes 32, 64"),
    a_block_size_of_text=({STATE: state(blocksize="64")}, "has blocksize '64'"),
    another_quant_type_inside=({STATE: state(quant_type="fp4")}, "contains quant_type 'fp4'"),
    an_unknown_quant_type=(renamed, "its quant_type is 'nf3', expected nf4 or fp4"),
    two_quant_states=(with_fp4, "it has both 'L.*__nf4' and 'L.*__fp4'"),
    codes_of_another_type=({"weight": torch.zeros(512, 1, dtype=torch.int8)},
                           r"it has codes of int8 \(512, 1\), expected C numbers of uint8, bfl"),
    nested_parts_of_plain_scales=({"weight.nested_absmax": torch.rand(1)},
                                  "it has nested_absmax, expected only codes, quant_state"),
    a_lone_absmax=(lambda _: {"weight.absmax": torch.rand(4)},
                   "'L.weight.absmax' is part of a weight packed by bitsandbytes whose"),
    a_lone_quant_map=(lambda _: {"weight.quant_map": torch.rand(16)},
                      "'L.weight.quant_map' is part of"),
    a_quant_state_of_scales=({"weight.absmax.quant_state.bitsandbytes__nf4": text("{}")},
                             "'L.weight.absmax.quant_state"),
) | damaged(
    lambda: of_4bit(nested=True),
    no_nested_scales=({"weight.nested_absmax": None}, "it has no nested_absmax, expected"),
    no_nested_codebook=({"weight.nested_quant_map": None}, "it has no nested_quant_map, expected"),
    no_nested_offset=({STATE: state("nested_offset")}, "256 and nested_offset None"),
    a_nested_offset_of_NaN=({STATE: state(nested_offset=float("nan"))}, "nested_offset nan"),
    no_nested_block_size=({STATE: state("nested_blocksize")}, "nested_blocksize None"),
    nested_scales_too_long=({"weight.nested_absmax": torch.rand(2)}, "has 2 nested_absmax"),
    a_short_nested_codebook=({"weight.nested_quant_map": torch.rand(16)},
                             r"nested_quant_map of float32 \(16,\), expected 256 numbers"),
) | damaged(
    lambda: Written({"weight": torch.zeros(4, 8, dtype=torch.int8), "SCB": torch.ones(4)}),
    lone_scales_of_int8=(lambda _: {"SCB": torch.rand(4)},
                         r"it has no weight, expected \(N, K\) of int8"),
    int8_scales_of_another_length=(
        {"SCB": torch.ones(5)}, r"SCB of float32 \(5,\), expected N numbers .* with N = 4"),
    int8_scales_of_floats=({"weight": torch.rand(4, 8)},
                           r"weight of float32 \(4, 8\), expected \(N, K\) of int8"),
    int8_in_tiles=({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "tiles"),
    a_lone_weight_format=(lambda _: {"weight_format": torch.tensor(0, dtype=torch.uint8)},
                          "'L.weight_format' is part of"),
    int8_of_two_quantisers=({"comfy_quant": text("{}")},
                            "it has both 'L.SCB' and 'L.comfy_quant'"),
)
