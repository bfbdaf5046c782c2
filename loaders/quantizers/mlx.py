"""Reads weights that MLX quantised, as mlx-lm, mlx-vlm and mflux store them.

`PARTS` of a layer of (N, K) in G groups of a row become one packed tensor. The codes are words of
32 bits, rows of a stream of bits, the lowest first. With biases value = code * scale + bias;
without them the scales are bytes, by whose groups the mode is told: mxfp4, mxfp8 (E8M0) or nvfp4
(E4M3).

A file gives only the bits of a code times the columns of a group. The config of a folder says both;
what mflux saves and files by themselves have groups of 64, as is MLX's default, or the only other
size that gives whole codes.

Source: MLX 0.32 `python/mlx/nn/layers/quantized.py`, `mlx/ops.cpp`.
"""
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.formats.comfy_quant import MXFP8, NVFP4_LOW
from ...ops.formats.integers import MLX_BITS, MLX_GROUP, MXFP4_ROWS, family_with_minimum
from ...ops.tensor.packed_layout import packed_rows
from .base import HeaderOf, Layer, Quantizer, layers_with
from .integers import SCALES, pack_nvfp4
from .parts import Part, PartError

WEIGHT, SCALE, BIAS = "weight", "scales", "biases"
WORDS = Part("(N, W)", (torch.uint32,))
PARTS = {
    "affine": {WEIGHT: WORDS, SCALE: Part("(N, G)", SCALES), BIAS: Part("(N, G)", SCALES)},
    "mxfp4, mxfp8 or nvfp4": {WEIGHT: WORDS, SCALE: Part("(N, G)", (torch.uint8,))},
}
GROUPS = (32, 64, 128)
VISION = re.compile(r"^visual\.")  # as `mlx_names` calls what configs call vision_tower
# bits of a code times columns of a group -> mode
MODES = {4 * 32: "mxfp4", 8 * 32: "mxfp8", 4 * 16: "nvfp4"}


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with words of codes and scales."""
    for layer in layers_with([SCALE, WEIGHT])(names, metadata, header_of):
        if header_of(f"{layer}.{WEIGHT}").dtype in WORDS.dtypes:
            yield layer


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its biases."""
    return "affine" if BIAS in layer.parts else "mxfp4, mxfp8 or nvfp4"


def read(layer: Layer) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    parts, sizes = layer.parts, layer.sizes
    words, scale, rows = parts[WEIGHT], parts[SCALE], sizes["N"]
    if sizes["W"] * 32 % sizes["G"]:
        raise PartError(f"its {sizes['G']} groups do not divide its {sizes['W']} words")
    codes, of_group = words.contiguous().view(torch.uint8), sizes["W"] * 32 // sizes["G"]
    if BIAS not in parts:
        mode = MODES.get(of_group)
        if mode is None:
            raise PartError(f"it has {of_group} bits a group, expected those of"
                            f" {', '.join(f'{name} ({bits})' for bits, name in MODES.items())}")
        if mode == "nvfp4":
            return pack_nvfp4(NVFP4_LOW, codes, scale, torch.ones(1, dtype=torch.float32))
        columns = sizes["G"] * 32
        if mode == "mxfp4":
            return packed_rows(MXFP4_ROWS, codes, (rows, columns), scale=scale)
        codes = codes.view(torch.float8_e4m3fn)
        return packed_rows(MXFP8, codes, (rows, columns), scale=scale)
    if parts[BIAS].dtype != scale.dtype:
        raise PartError(f"its scales are {scale.dtype} and its biases {parts[BIAS].dtype}, expected"
                        " the same")
    bits, group = _size(layer, of_group)
    family = family_with_minimum("MLX", bits, scale.dtype)
    return packed_rows(family, codes, (rows, sizes["G"] * group), (group,),
                       scale=scale, minimum=parts[BIAS])


def _size(layer: Layer, of_group: int) -> tuple[int, int]:
    """Returns the bits of a code and the columns of a group, whose product is `of_group`."""
    sizes = [(of_group // group, group) for group in GROUPS
             if of_group % group == 0 and of_group // group in MLX_BITS]
    stated: dict[str, Any] = dict(layer.file.quantization)
    own = stated.get(layer.name) or stated.get(VISION.sub("vision_tower.", layer.name))
    stated |= own if isinstance(own, dict) else {}
    for key, index in (("bits", 0), ("group_size", 1)):
        if isinstance(stated.get(key), int) and (key != "bits" or "group_size" in stated):
            fitting = [size for size in sizes if size[index] == stated[key]]
            if not fitting:
                raise PartError(f"it has {of_group} bits a group, and its config says"
                                f" {key} {stated[key]}")
            sizes = fitting
    if not sizes:
        raise PartError(f"it has {of_group} bits a group, expected"
                        f" {', '.join(map(str, MLX_BITS[:-1]))} or {MLX_BITS[-1]} bits a value in"
                        f" groups of {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}")
    return next((size for size in sizes if size[1] == MLX_GROUP), sizes[0])


QUANTIZER = Quantizer(name="MLX", methods={"mlx": "MLX"}, find=find, layouts=PARTS, layout=layout,
                      read=read)
