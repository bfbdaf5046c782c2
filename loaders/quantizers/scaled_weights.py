"""Reads weights of 8 and 4 bits with scales that have no marker of ComfyUI's.

| written by | layout of `PARTS` |
|---|---|
| Black Forest Labs (fp8r), ModelOpt, compressed-tensors (float-quantized); scaled fp8 | rows |
| whose marker is lost has the name `scale_weight` | |
| transformers | blocks |
| Black Forest Labs, ModelOpt; the low nibble comes first | nvfp4 |

They become one packed tensor. A value is the number of its code times its scale, whatever the name
says; the last blocks of rows and columns may be short. ModelOpt's layers may have
`pre_quant_scale` (K,), factors of the input, which become those of the columns. Scales of the input
say nothing about the values.

Sources: transformers 5.14 `integrations/finegrained_fp8.py`, diffusers 0.42 `quantizers/bfl`.
"""
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.formats.comfyui import NVFP4_LOW
from ...ops.tensor.packed_layout import packed_rows
from ...ops.tensor.packed_tensor import PackedTensor
from .base import HeaderOf, Layer, Quantizer, scaled_layers, without_marked
from .comfyui import FP8, SMOOTHING, smooth
from .comfyui_marks import OLD_SCALE, marked_layers
from .integers import CODES_OF_ROWS, SCALES_OF_ROWS, nvfp4_parts, pack_nvfp4, pack_rows
from .parts import FLOATS, Part, PartError

SCALE, OF_BLOCKS, OF_TENSOR = "weight_scale", "weight_scale_inv", "weight_scale_2"
OF_ROWS = Part(SCALES_OF_ROWS.shape, FLOATS, other_names=(OLD_SCALE[1:],))
BESIDE = {name: Part("", optional=name)
          for name in ("input_scale", "activation_scale", "scale_input", SMOOTHING)}
PARTS = {
    "rows": {"weight": CODES_OF_ROWS, SCALE: OF_ROWS, **BESIDE},  # of a convolution too
    "blocks": {"weight": Part("(N, K)", tuple(FP8)), OF_BLOCKS: Part("1 or (R, C)", FLOATS),
               **BESIDE},
    "nvfp4": nvfp4_parts("weight", SCALE, OF_TENSOR, *OF_ROWS.other_names) | BESIDE,
}
BLOCK = 128  # rows and columns, unless the scales say otherwise


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with weights of one byte and scales."""
    ends = (OF_BLOCKS, SCALE, OLD_SCALE[1:])
    for layer in without_marked(scaled_layers(names, ends), metadata, names):
        dtype = header_of(f"{layer}.weight").dtype
        if dtype is not None and dtype.itemsize == 1:
            yield layer


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its codes and scales."""
    if OF_BLOCKS in layer.parts:
        return "blocks"
    if layer.parts["weight"].dtype != torch.uint8:
        return "rows"
    if marked_layers(layer.file.metadata, layer.file.entries):
        raise PartError("it has no comfy_quant, as other layers have")
    return "nvfp4"


def read(layer: Layer) -> PackedTensor:
    """Returns the weight of a layer, packed, from its parts."""
    parts, weight = layer.parts, layer.parts["weight"]
    if layer.layout == "nvfp4":
        packed = pack_nvfp4(NVFP4_LOW, weight, parts[SCALE], parts[OF_TENSOR])
    elif "R" in layer.sizes:
        packed = _fp8_in_blocks(weight, parts[OF_BLOCKS])
    else:
        packed = pack_rows(weight, parts[SCALE if SCALE in parts else OF_BLOCKS])
    return smooth(packed, parts[SMOOTHING]) if SMOOTHING in parts else packed


def _fp8_in_blocks(weight: torch.Tensor, scale: torch.Tensor) -> PackedTensor:
    (rows, columns), (block_rows, block_columns) = weight.shape, _block_lengths(weight.shape, scale)
    # columns whose number is no multiple of a block's repeat its scale for smaller groups
    group = math.gcd(block_columns, columns)
    scales = scale.float().repeat_interleave(block_rows, 0)[:rows]
    scales = scales.repeat_interleave(block_columns // group, 1)[:, :columns // group]
    return packed_rows(FP8[weight.dtype], weight, weight.shape, (group,), scale=scales)


def _block_lengths(shape: torch.Size, scale: torch.Tensor) -> tuple[int, ...]:
    """Returns the rows and columns of a block."""
    lengths = []
    for size, count in zip(shape, scale.shape):
        if count != -(-size // BLOCK) and size % count:
            raise PartError(f"it has scales of {tuple(scale.shape)} blocks, which do not divide"
                            f" {tuple(shape)} values")
        lengths.append(BLOCK if count == -(-size // BLOCK) else size // count)
    return tuple(lengths)


QUANTIZER = Quantizer(
    name="transformers, ModelOpt, Black Forest Labs or the like",
    methods={"fp8": "transformers in fp8"}, find=find, layouts=PARTS, layout=layout, read=read)
