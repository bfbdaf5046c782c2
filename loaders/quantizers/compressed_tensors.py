"""Reads weights that compressed-tensors packed, as llm-compressor writes them.

| in the file (layer `L`, weight (N, K), G groups) | format |
|---|---|
| `L.weight_packed` int32 (N, K * bits / 32), `L.weight_scale` (N, G), | pack-quantized |
| `L.weight_shape` (2,), optional `L.weight_zero_point` int32 (N * bits / 32, G) or int8 (N, G), | |
| `L.weight_g_idx` int32 (K,) | |
| `L.weight` int8 (N, K), `L.weight_scale` (N, G), optional `L.weight_zero_point` | int-quantized |
| `L.weight_packed` uint8 (N, K / 2), `L.weight_scale` fp8 E4M3 (N, K / 16), | nvfp4-pack- |
| `L.weight_global_scale` (1,) | quantized |

Each becomes one packed tensor `L.weight`. The words are a stream of bits along the columns (along
the rows for zeros). Codes and zeros are integers plus half their range, and value = (code - zero) *
scale. In nvfp4, value = code * (scale / global scale). int-quantized and float-quantized weights
with a scale for each row have no zeros, and `scaled_weights.py` reads them.

Source: compressed-tensors 0.20.0 `compressors/pack_quantized/helpers.py`,
`quantization/lifecycle/forward.py`.
"""
from collections.abc import Iterator, Mapping

import torch

from ...ops.formats.integers import BITS, NVFP4_QUOTIENT
from ..files.container import WeightFile, describe
from .base import PartError, Parts, of_layers, part
from .integers import pack_integers, pack_nvfp4, split_words

PACKED, WEIGHT, SHAPE = "weight_packed", "weight", "weight_shape"
SCALE, ZEROS, GROUPS = "weight_scale", "weight_zero_point", "weight_g_idx"
GLOBAL = "weight_global_scale"
OF_INPUT = ("input_global_scale", "input_scale", "input_zero_point")
PARTS = (PACKED, WEIGHT, SHAPE, SCALE, ZEROS, GROUPS, GLOBAL, *OF_INPUT)


def _layers_of_int8(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yields the layers of int8 codes with scales of groups."""
    for name, scale in tensors.items():
        layer = name.removesuffix(f".{SCALE}")
        codes = tensors.get(f"{layer}.{WEIGHT}")
        if layer == name or codes is None or (codes.dtype, codes.ndim) != (torch.int8, 2):
            continue
        if scale.ndim == 2 and len(scale) == len(codes) and scale.shape[1] > 1:
            yield layer


def read_weight(file: WeightFile, layer: str, parts: Parts) -> torch.Tensor:
    """Returns the weight of a layer, packed, from its parts."""
    if ZEROS not in parts and _is_asymmetric(file):
        raise PartError(f"it has no {ZEROS}, and its config says that it is not symmetric")
    if PACKED not in parts:
        return _int_quantized(parts)
    codes = parts[PACKED]
    if codes.ndim != 2 or not codes.numel() or codes.dtype not in (torch.int32, torch.uint8):
        raise PartError(f"its {PACKED} is {describe(codes)}, expected rows of int32 or uint8")
    return _nvfp4(parts) if codes.dtype == torch.uint8 else _pack_quantized(parts)


def _is_asymmetric(file: WeightFile) -> bool:
    """Returns whether the config says so of all groups of layers."""
    groups = file.quantization.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)
               ] if isinstance(groups, dict) else []
    return bool(weights) and all(isinstance(given, dict) and given.get("symmetric") is False
                                 for given in weights)


def _nvfp4(parts: Parts) -> torch.Tensor:
    codes, scale = parts[PACKED], part(parts, SCALE)
    if GLOBAL not in parts:
        raise PartError(f"it has {describe(codes)} codes without a {GLOBAL}; of 4-bit floats, only"
                        " nvfp4 is read")
    packed = pack_nvfp4(NVFP4_QUOTIENT, codes, scale, parts[GLOBAL])
    if packed is None:
        expected = len(codes), codes.shape[1] * 2 // NVFP4_QUOTIENT.example.group
        raise PartError(f"its {SCALE} is {describe(scale)} and its {GLOBAL}"
                        f" {describe(parts[GLOBAL])}, expected fp8 E4M3 {expected} and one number")
    return packed


def _pack_quantized(parts: Parts) -> torch.Tensor:
    codes, stored = parts[PACKED], part(parts, SHAPE)
    if stored.is_floating_point() or stored.numel() != 2:
        raise PartError(f"its {SHAPE} is {describe(stored)}, expected two whole numbers")
    shape = stored.flatten().tolist()
    if shape[0] != len(codes) or min(shape) < 1:
        raise PartError(f"its {SHAPE} is {shape} and its {PACKED} {describe(codes)}")
    rows, columns = shape
    widths = [bits for bits in BITS if -(-columns * bits // 32) == codes.shape[1]]
    if len(widths) != 1 or columns * widths[0] % 8 or (columns % 8 and widths[0] == 3):
        raise PartError(f"its {PACKED} is {describe(codes)} for {columns} columns, expected words"
                        f" of {', '.join(map(str, BITS))} bits a value without gaps")
    bits = widths[0]
    scales = _scales(parts, rows)
    zeros, groups = parts.get(ZEROS), parts.get(GROUPS)
    if zeros is not None and zeros.dtype == torch.int32:
        if tuple(zeros.shape) != (-(-rows * bits // 32), scales.shape[1]):
            raise PartError(f"its {ZEROS} is {describe(zeros)}")
        zeros = _fields(zeros.t(), bits)[:, :rows].t()
    elif zeros is not None:
        zeros = _plus_half(zeros, scales, bits)
    if groups is not None and bool((groups < 0).any()):
        groups = None  # -1: the columns are in order
    packed = codes.contiguous().view(torch.uint8)[:, :columns * bits // 8].contiguous()
    return pack_integers(packed, columns, bits, scales, zeros, groups)


def _int_quantized(parts: Parts) -> torch.Tensor:
    codes = parts[WEIGHT]
    if (codes.dtype, codes.ndim) != (torch.int8, 2) or not codes.numel():
        raise PartError(f"it has zeros, but its weight is {describe(codes)}, expected int8 (N, K)")
    scales, zeros = _scales(parts, len(codes)), parts.get(ZEROS)
    if zeros is not None:
        zeros = _plus_half(zeros, scales, 8)
    return pack_integers(codes.contiguous().view(torch.uint8) ^ 0x80, codes.shape[1], 8, scales,
                         zeros, parts.get(GROUPS))


def _scales(parts: Parts, rows: int) -> torch.Tensor:
    """Returns scales (N, G) of one number, of one for each row or of one for each group."""
    scales = part(parts, SCALE)
    if not scales.is_floating_point():
        raise PartError(f"its {SCALE} is {describe(scales)}")
    if scales.numel() == 1:
        return scales.view(1, 1).expand(rows, 1).contiguous()
    if scales.ndim == 1:
        scales = scales.unsqueeze(-1)
    if scales.ndim != 2 or len(scales) != rows:
        raise PartError(f"its {SCALE} is {describe(scales)}, expected some for each of {rows} rows")
    return scales


def _plus_half(zeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns zeros that are integers around 0 as uint8 (N, G), codes that mean 0."""
    if zeros.numel() == 1:
        zeros = zeros.view(1, 1).expand(scales.shape)
    half = 1 << bits - 1
    if (zeros.dtype != torch.int8 or zeros.numel() != scales.numel() or len(zeros) != len(scales)
            or not -half <= int(zeros.min()) <= int(zeros.max()) < half):
        raise PartError(f"its {ZEROS} is {describe(zeros)}, expected {bits}-bit integers of"
                        f" {tuple(scales.shape)}")
    return (zeros.reshape(scales.shape).short() + half).to(torch.uint8)


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns `split_words`; of 3 bits, words are filled up to whole groups of fields first."""
    missing = -words.shape[1] % bits if bits == 3 else 0
    return split_words(torch.nn.functional.pad(words, (0, missing)), bits)


QUANTIZER = of_layers(
    "compressed-tensors", PARTS, {PACKED: (), ZEROS: (WEIGHT, SCALE)}, read_weight,
    {"compressed-tensors": "compressed-tensors"}, _layers_of_int8)
