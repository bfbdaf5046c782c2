"""Reads weights that compressed-tensors packed, as llm-compressor writes them.

`PARTS` of a layer of (N, K) in G groups become one packed tensor. The words are a stream of bits
along the columns, (N, K * bits / 32), and along the rows for zeros, (N * bits / 32, G); these may
also be int8 (N, G). Codes and zeros are integers plus half their range, and value = (code - zero) *
scale. In nvfp4, value = code * (scale / global scale); in mxfp4 and mxfp6, codes of 4 and 6 bits
(E2M1, E2M3) in a stream, value = code * 2**(scale - 127). AutoRound writes these floats likewise.
int-quantized weights with a scale for each row have no zeros, and `scaled_weights.py` reads them,
and float-quantized and mxfp8 ones.

Source: compressed-tensors 0.20.0 `compressors/pack_quantized/helpers.py`,
`compressors/mxfp6/helpers.py`, `compressors/mx_utils.py`, `quantization/lifecycle/forward.py`;
auto-round 0.16.1 `auto_round/export/export_to_autoround/qlinear_fp.py`.
"""
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.formats.integers import BITS, MXFP4_ROWS, MXFP6_ROWS, NVFP4_QUOTIENT
from ...ops.tensor.packed_layout import packed_rows
from ..container.weight_file import WeightFile, describe
from .base import HeaderOf, Layer, Quantizer, layers_with, without_marked
from .integers import (
    E8M0,
    SCALES,
    check_columns,
    nvfp4_parts,
    pack_integers,
    pack_nvfp4,
    settings_of_groups,
    split_words,
)
from .parts import WHOLE, Part, PartError

PACKED, WEIGHT, SHAPE = "weight_packed", "weight", "weight_shape"
SCALE, ZEROS, GROUPS = "weight_scale", "weight_zero_point", "weight_g_idx"
GLOBAL = "weight_global_scale"
INPUT_PARTS = {name: Part("", optional=name)
            for name in ("input_global_scale", "input_scale", "input_zero_point")}
UNUSED = INPUT_PARTS | {WEIGHT: Part("", optional=WEIGHT)}  # with packed codes
GROUPED = {SCALE: Part("1 or (N,) or (N, G)", SCALES), GROUPS: Part("K", WHOLE, GROUPS)}
PARTS = {
    "pack-quantized": {
        PACKED: Part("(N, W)", (torch.int32,)), SHAPE: Part("2", WHOLE), **GROUPED,
        ZEROS: Part("", (torch.int32, torch.int8), ZEROS), **UNUSED},
    "int-quantized": {
        WEIGHT: Part("(N, K)", (torch.int8,)), **GROUPED, ZEROS: Part("", (torch.int8,), ZEROS),
        **INPUT_PARTS},
    "nvfp4-pack-quantized": {**nvfp4_parts(PACKED, SCALE, GLOBAL), **UNUSED},
    "mxfp4-pack-quantized": {
        PACKED: Part("(N, K / 2)", (torch.uint8,)), SCALE: Part("(N, K / 32)", E8M0), **UNUSED},
    "mxfp6-pack-quantized": {
        PACKED: Part("(N, K * 3 / 4)", (torch.uint8,)), SCALE: Part("(N, K / 32)", E8M0),
        **UNUSED},
}
MX_FAMILIES = {"mxfp4-pack-quantized": MXFP4_ROWS, "mxfp6-pack-quantized": MXFP6_ROWS}


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with packed codes, with zeros, or of int8 with scales of groups."""
    yield from layers_with([PACKED], [ZEROS, WEIGHT, SCALE])(names, metadata, header_of)
    yield from without_marked(_layers_of_int8(names, header_of), metadata, names)


def _layers_of_int8(names: Collection[str], header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers of int8 codes with scales of groups."""
    for name in names:
        layer = name.removesuffix(f".{SCALE}")
        if layer == name or f"{layer}.{WEIGHT}" not in names:
            continue
        codes, scale = header_of(f"{layer}.{WEIGHT}"), header_of(name)
        if (codes.dtype, len(codes.shape), len(scale.shape)) == (torch.int8, 2, 2) and (
                scale.shape[0] == codes.shape[0] and scale.shape[1] > 1):
            yield layer


def layout(layer: Layer) -> str:
    """Returns the name of a layer's layout, by its codes."""
    if ZEROS not in layer.parts and _is_asymmetric(layer.file):
        raise PartError(f"it has no {ZEROS}, and its config says that it is not symmetric")
    if PACKED not in layer.parts:
        return "int-quantized"
    codes, scale = layer.parts[PACKED], layer.parts.get(SCALE)
    if codes.dtype != torch.uint8:
        return "pack-quantized"
    if GLOBAL in layer.parts or scale is None or scale.dtype not in E8M0:
        return "nvfp4-pack-quantized"
    # 32 values share a scale
    is_mxfp6 = codes.shape[-1:].numel() * 8 == scale.shape[-1:].numel() * 32 * 6
    return "mxfp6-pack-quantized" if is_mxfp6 else "mxfp4-pack-quantized"


def read(layer: Layer) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    parts = layer.parts
    if GLOBAL in parts:
        return pack_nvfp4(NVFP4_QUOTIENT, parts[PACKED], parts[SCALE], parts[GLOBAL])
    if layer.layout in MX_FAMILIES:
        return packed_rows(MX_FAMILIES[layer.layout], parts[PACKED],
                           (layer.sizes["N"], layer.sizes["K"]), scale=parts[SCALE])
    return _pack_quantized(layer) if PACKED in parts else _int_quantized(layer)


def _is_asymmetric(file: WeightFile) -> bool:
    """Returns whether the config says so of all groups of layers."""
    weights = settings_of_groups(file)
    return bool(weights) and all(given.get("symmetric") is False for given in weights)


def _pack_quantized(layer: Layer) -> torch.Tensor:
    parts = layer.parts
    codes, shape = parts[PACKED], parts[SHAPE].flatten().tolist()
    if shape[0] != len(codes) or min(shape) < 1:
        raise PartError(f"its {SHAPE} is {shape} and its {PACKED} {describe(codes)}")
    rows, columns = shape
    if layer.sizes.get("K", columns) != columns:
        raise PartError(f"its {GROUPS} is {describe(parts[GROUPS])} for {columns} columns")
    widths = [bits for bits in BITS if -(-columns * bits // 32) == codes.shape[1]]
    settled = [given.get("num_bits") for given in settings_of_groups(layer.file)]
    widths = [bits for bits in widths if bits in settled] or widths
    if len(widths) != 1:
        raise PartError(f"its {PACKED} is {describe(codes)} for {columns} columns, expected words"
                        f" of {', '.join(map(str, BITS))} bits a value without gaps")
    bits = widths[0]
    check_columns(columns, bits)
    scales = _scales(layer)
    zeros, groups = parts.get(ZEROS), parts.get(GROUPS)
    if zeros is not None and zeros.dtype == torch.int32:
        if tuple(zeros.shape) != (-(-rows * bits // 32), scales.shape[1]):
            raise PartError(f"its {ZEROS} is {describe(zeros)}")
        zeros = _fields(zeros.t(), bits)[:, :rows].t()
    elif zeros is not None:
        zeros = _plus_half(zeros, scales, bits)
    if groups is not None and bool((groups < 0).any()):
        groups = None  # -1: the columns are in order
    _check_groups(layer, columns, scales.shape[1])
    packed = codes.contiguous().view(torch.uint8)[:, :columns * bits // 8].contiguous()
    return pack_integers(packed, columns, bits, scales, zeros, groups)


def _int_quantized(layer: Layer) -> torch.Tensor:
    parts, codes = layer.parts, layer.parts[WEIGHT]
    scales, zeros = _scales(layer), parts.get(ZEROS)
    if zeros is not None:
        zeros = _plus_half(zeros, scales, 8)
    _check_groups(layer, codes.shape[1], scales.shape[1])
    return pack_integers(codes.contiguous().view(torch.uint8) ^ 0x80, codes.shape[1], 8, scales,
                         zeros, parts.get(GROUPS))


def _scales(layer: Layer) -> torch.Tensor:
    """Returns scales (N, G) of one number, of one for each row or of one for each group."""
    scales = layer.parts[SCALE]
    if scales.numel() == 1:
        return scales.view(1, 1).expand(layer.sizes["N"], 1).contiguous()
    return scales.unsqueeze(-1) if scales.ndim == 1 else scales


def _check_groups(layer: Layer, columns: int, count: int):
    """Raises PartError if a row has another number of scales than the config says."""
    counts = set()
    for given in settings_of_groups(layer.file):
        size = given.get("group_size")
        if given.get("strategy") in ("channel", "tensor") or size == -1:
            counts.add(1)
        elif isinstance(size, int) and size > 0:
            counts.add(-(-columns // size))
        else:
            return  # it does not say
    if counts and count not in counts:
        raise PartError(f"its {SCALE} has {count} scales for each row of {columns} columns,"
                        f" expected {' or '.join(map(str, sorted(counts)))} by the config's"
                        " group_size")


def _plus_half(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns zeros that are integers around 0 as uint8 (N, G), codes that mean 0."""
    if zeros.numel() == 1:
        zeros = zeros.view(1, 1).expand(scales.shape)
    half = 1 << bits - 1
    if (zeros.numel() != scales.numel() or len(zeros) != len(scales)
            or not -half <= int(zeros.min()) <= int(zeros.max()) < half):
        raise PartError(f"its {ZEROS} is {describe(zeros)}, expected {bits}-bit integers of"
                        f" {tuple(scales.shape)}")
    return (zeros.reshape(scales.shape).short() + half).to(torch.uint8)


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns `split_words`; where bits do not divide 8, words are filled up to whole groups of
    fields first."""
    missing = -words.shape[1] % bits if 8 % bits else 0
    return split_words(torch.nn.functional.pad(words, (0, missing)), bits)


QUANTIZER = Quantizer(
    name="compressed-tensors", find=find, methods={
        "compressed-tensors": "compressed-tensors", "auto-round": "AutoRound",
        "intel/auto-round": "AutoRound"},
    layouts=PARTS, layout=layout, read=read, is_uniform=True)
