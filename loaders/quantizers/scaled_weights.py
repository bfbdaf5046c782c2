"""Reads weights of 8 and 4 bits with scales that have no marker of ComfyUI's.

| written by | layout of `PARTS` |
|---|---|
| Black Forest Labs (fp8r), ModelOpt, compressed-tensors (float-quantized); scaled fp8 | rows |
| whose marker is lost, and int8 of LightX2V with that marker, have the name `scale_weight` | |
| transformers, compressed-tensors (float-quantized, where scales are those of blocks or groups) | |
| , musubi-tuner, whose scales (N, C, 1) may be times a `scale_weight_tensor` | blocks |
| compressed-tensors, AutoRound | mxfp8 |
| Black Forest Labs, ModelOpt; the low nibble comes first | nvfp4 |

LightX2V's other bytes (`LIGHTX2V`), with scales in the order of its kernels, are not read.

They become one packed tensor. A value is the number of its code times its scale, whatever the name
says, of mxfp8 times 2**(scale - 127); the last blocks of rows and columns may be short. ModelOpt's
layers may have `pre_quant_scale` (K,), factors of the input, which become those of the columns, and
of SVDQuant a low rank, `svdquant_lora_b` times `svdquant_lora_a`, whose input has these factors
too. Scales of the input say nothing about the values.

Sources: transformers 5.14 `integrations/finegrained_fp8.py`, diffusers 0.42 `quantizers/bfl`,
compressed-tensors 0.20.0 `compressors/naive_quantized/base.py` and `compressors/mxfp8/base.py`,
nvidia-modelopt 0.47.0 `torch/quantization/nn/modules/quant_linear.py` and
`torch/export/unified_export_hf.py`, musubi-tuner `modules/fp8_optimization_utils.py`, LightX2V
`tools/convert/quant/quant.py` and `lightx2v_kernel/gemm.py`.
"""
import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.formats.comfy_quant import INT8_GROUPS, MXFP8, NVFP4_LOW
from ...ops.formats.low_rank_and_joined import FACTOR_DTYPES
from ...ops.tensor.packed_layout import packed_rows, with_low_rank
from ...ops.tensor.packed_tensor import PackedTensor
from ..container.weight_file import WeightFile, describe, safe_repr
from ..name_lists import join_some
from .base import HeaderOf, Layer, Quantizer, Read, scaled_layers
from .comfy_quant import has_block_scales, nvfp4_scale_shapes, smooth
from .comfy_quant_formats import FP8, GROUP_SCALE, SMOOTHING
from .comfy_quant_marks import OLD_SCALE, SETTINGS, marked_layers
from .integers import (
    CODES_OF_ROWS,
    E8M0,
    SCALES_OF_ROWS,
    nvfp4_parts,
    pack_nvfp4,
    pack_rows,
    settings_of_groups,
)
from .parts import FLOATS, GET_OTHER_CONVERSION, Part, PartError

SCALE, BLOCK_SCALE, TENSOR_SCALE = "weight_scale", "weight_scale_inv", "weight_scale_2"
# dtypes of the scales of blocks
BLOCK_SCALE_DTYPES = tuple(dtype for dtype in FLOATS if dtype.itemsize > 1 or dtype in E8M0)
ROWS_PART = Part(SCALES_OF_ROWS.shape, FLOATS, other_names=(OLD_SCALE[1:],))
WHOLE = "scale_weight_tensor"  # a factor of all scales
GLOBAL = "weight_global_scale"
BLOCK_FAMILIES = {**FP8, torch.int8: INT8_GROUPS}
# what LightX2V calls bytes with exponents of 32 columns -> bits of a value
LIGHTX2V = {"mxfp4": 4, "mxfp6": 6, "mxfp8": 8}
DOWN, UP = "svdquant_lora_a", "svdquant_lora_b"
FACTORS = tuple(FACTOR_DTYPES.values())
BESIDE = {name: Part("", optional=name)
          for name in ("input_scale", "activation_scale", "scale_input", GROUP_SCALE)}
BESIDE |= {SMOOTHING: Part("", FLOATS, optional=SMOOTHING),
           DOWN: Part("(T, K)", FACTORS, "low rank"), UP: Part("(N, T)", FACTORS, "low rank")}
WHOLE_PART = {WHOLE: Part("1", FLOATS, optional=WHOLE)}
PARTS = {
    # of a convolution too
    "rows": {"weight": CODES_OF_ROWS, SCALE: ROWS_PART, **WHOLE_PART, **BESIDE},
    "blocks": {"weight": Part("(N, K)", tuple(BLOCK_FAMILIES)),
               BLOCK_SCALE: Part("1 or (R, C) or (R, C, 1)", BLOCK_SCALE_DTYPES), **WHOLE_PART,
               **BESIDE},
    "mxfp8": {"weight": Part("(N, K)", (torch.float8_e4m3fn,)), SCALE: Part("(N, K / 32)", E8M0),
              **BESIDE},
    "nvfp4": nvfp4_parts("weight", SCALE, TENSOR_SCALE, *ROWS_PART.other_names) | BESIDE,
}
BLOCK = 128  # rows and columns, unless the scales say otherwise


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with weights of one byte and scales, also of those under `scaled_fp8` that
    ComfyUI does not read: int8, and scales with a factor."""
    ends = (BLOCK_SCALE, SCALE, OLD_SCALE[1:], GROUP_SCALE)
    marked = None
    for layer in scaled_layers(names, ends):
        marked = marked_layers(metadata, names) if marked is None else marked
        dtype = header_of(f"{layer}.weight").dtype
        if dtype is not None and dtype.itemsize == 1 and (layer not in marked or (
                SETTINGS not in metadata and (
                    dtype == torch.int8 or f"{layer}.{WHOLE}" in names))):
            yield layer


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its codes and scales."""
    if GROUP_SCALE in layer.parts:
        raise PartError("it has no comfy_quant, which says how its columns are rotated")
    weight, scale = layer.parts["weight"], layer.parts.get(SCALE)
    if BLOCK_SCALE in layer.parts:
        return "blocks"
    is_mxfp8 = (weight.dtype in FP8 and scale is not None and scale.dtype in E8M0
                and scale.ndim == 2)
    if weight.dtype in BLOCK_FAMILIES and scale is not None and not is_mxfp8 and (
            has_block_scales(weight, scale) or (weight.ndim == scale.ndim == 2 and (
                scale.shape[1] > 1 or (weight.dtype in FP8 and len(scale) not in (1, len(weight)))
            )) or (weight.dtype in FP8 and _is_in_blocks(layer.file))):
        # what transformers stores under the other name
        layer.parts[BLOCK_SCALE] = layer.parts.pop(SCALE)
        layer.names[BLOCK_SCALE] = layer.names.pop(SCALE)
        return "blocks"
    if weight.dtype == torch.uint8 and scale is not None:
        _reject_unread_bytes(layer, weight, scale)
    if weight.dtype != torch.uint8 and not is_mxfp8:
        return "rows"
    if is_mxfp8 and not layer.file.quantization and not any(
            size % piece for size, piece in zip(layer.parts[SCALE].shape, (128, 4))):
        raise PartError("its scales may be in rows, or in ComfyUI's order without its comfy_quant",
                        "Pick the folder with its config.json, which says who wrote them.")
    return "mxfp8" if is_mxfp8 else "nvfp4"


def _reject_unread_bytes(layer: Layer, weight: torch.Tensor, scale: torch.Tensor):
    """Raises PartError for bytes that are not nvfp4 by their shapes, and for LightX2V's."""
    is_nvfp4 = scale.dtype == torch.float8_e4m3fn and (
        tuple(scale.shape) in nvfp4_scale_shapes(weight.shape)[:1])
    lightx2v = "nvfp4" if f"{layer.name}.{GLOBAL}" in layer.file.entries else ""
    if weight.ndim == 2 and scale.dtype in E8M0:  # in pieces of 128 rows and 4 columns
        lightx2v = lightx2v or next(
            (name for name, bits in LIGHTX2V.items() if scale.shape == (
                -(-len(weight) // 128) * 128, -(-weight.shape[1] * 8 // bits // 128) * 4)), "")
    if lightx2v:
        raise PartError(f"it is in {lightx2v}, which is not read from its files",
                        "Get its fp8 or int8, or the model as GGUF.", "LightX2V")
    if not is_nvfp4:
        raise PartError(f"it has weight of {describe(weight)} and {SCALE} of {describe(scale)},"
                        " which are of no format that is read", writer="an unknown tool")


def _is_in_blocks(file: WeightFile) -> bool:
    """Returns whether the config says that all weights have scales of blocks."""
    groups = settings_of_groups(file)
    return bool(groups) and all(settings.get("strategy") == "block" for settings in groups)


@contextlib.contextmanager
def session(file: WeightFile, tensors: Mapping[str, torch.Tensor]) -> Iterator[Read]:
    """Gives `read`. Refuses fp8 without scales where a config says that weights have them, and
    notes layers of SVDQuant without the factors that others have."""
    factors: dict[bool, list[str]] = {False: [], True: []}

    def read_and_note(layer: Layer) -> PackedTensor:
        if DOWN in layer.parts:
            factors[SMOOTHING in layer.parts].append(layer.name)
        return read(layer)

    yield read_and_note
    marked = marked_layers(file.metadata, file.entries)
    for name, tensor in tensors.items() if file.quantization else ():
        if name.endswith(".weight") and tensor.dtype in FP8 and (
                name.removesuffix(".weight") not in marked):
            raise file.error_at(name, f"{safe_repr(name)} has no {SCALE}, as other layers have",
                                GET_OTHER_CONVERSION)
    if all(factors.values()):
        file.note(f"{file.path.name}: there is no {SMOOTHING}, as other layers have, of"
                  f" {join_some(map(safe_repr, factors[False]))}.")


def read(layer: Layer) -> PackedTensor:
    """Returns the weight of a layer, packed, from its parts."""
    parts, weight = layer.parts, layer.parts["weight"]
    if WHOLE in parts:
        scaled = BLOCK_SCALE if BLOCK_SCALE in parts else SCALE
        parts[scaled] = parts[scaled].float() * parts[WHOLE].float().flatten()
    if layer.layout == "nvfp4":
        packed = pack_nvfp4(NVFP4_LOW, weight, parts[SCALE], parts[TENSOR_SCALE])
    elif layer.layout == "mxfp8":
        packed = packed_rows(MXFP8, weight, weight.shape, scale=parts[SCALE])
    elif "R" in layer.sizes or (BLOCK_SCALE in parts and parts[BLOCK_SCALE].ndim > 1):
        packed = _in_blocks(layer, weight, parts[BLOCK_SCALE].flatten(1))
    else:
        packed = pack_rows(weight, parts[SCALE if SCALE in parts else BLOCK_SCALE])
    smoothing = parts.get(SMOOTHING)
    packed = packed if smoothing is None else smooth(packed, smoothing)
    if DOWN not in parts:
        return packed
    factors = None if smoothing is None else (
        torch.ones(len(weight), dtype=torch.float32), smoothing.float().flatten())
    return with_low_rank(packed, parts[UP], parts[DOWN], factors)


def _in_blocks(layer: Layer, weight: torch.Tensor, scale: torch.Tensor) -> PackedTensor:
    rows, columns = weight.shape
    block_rows, block_columns = _block_lengths(layer.file, weight.shape, scale)
    # columns whose number is no multiple of a block's repeat its scale for smaller groups
    group = math.gcd(block_columns, columns)
    # the config may say blocks of any size
    row_count, group_count = min(block_rows, rows), min(block_columns, columns) // group
    scales = scale.float().repeat_interleave(row_count, 0)[:rows]
    scales = scales.repeat_interleave(group_count, 1)[:, :columns // group]
    return packed_rows(BLOCK_FAMILIES[weight.dtype], weight, weight.shape, (group,), scale=scales)


def _block_lengths(file: WeightFile, shape: torch.Size, scale: torch.Tensor) -> tuple[int, ...]:
    """Returns the rows and columns of a block: those of the config, or `BLOCK`, or what divides."""
    given = [file.quantization.get("weight_block_size")]
    groups = settings_of_groups(file)
    for settings in groups:
        given += [settings.get("block_structure"), [1, settings.get("group_size")]]
    if len(scale) == shape[0] and shape[1] % scale.shape[1] == 0:
        given.append([1, shape[1] // scale.shape[1]])
    for lengths in (*given, [BLOCK, BLOCK]):
        if isinstance(lengths, list) and len(lengths) == 2 and all(
                type(length) is int and length > 0 and count == -(-size // length)
                for length, size, count in zip(lengths, shape, scale.shape)):
            return tuple(lengths)
    if given[0] or (groups and all(settings.get("block_structure") for settings in groups)):
        raise PartError(f"it has scales of {tuple(scale.shape)} blocks for {tuple(shape)} values,"
                        " expected blocks of the size that its config says")
    lengths = []
    for size, count in zip(shape, scale.shape):
        if count != -(-size // BLOCK) and size % count:
            raise PartError(f"it has scales of {tuple(scale.shape)} blocks, which do not divide"
                            f" {tuple(shape)} values")
        lengths.append(BLOCK if count == -(-size // BLOCK) else size // count)
    return tuple(lengths)


QUANTIZER = Quantizer(
    name="transformers, ModelOpt, Black Forest Labs or the like",
    methods={"fp8": "transformers in fp8", "modelopt": "ModelOpt"}, find=find, layouts=PARTS,
    layout=layout, session=session, leftovers=re.compile(rf"\.{WHOLE}$"))
