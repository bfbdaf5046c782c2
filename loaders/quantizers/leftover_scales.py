"""Multiplies weights by scales that stand beside them although their type does not need any.

Converters that do not know a quantised format copy its parts one by one: the codes become weights
in Q8_0 or F16, and their scales stay beside them.

| in the file (layer `L`, weight (N, K) packed or of 16 or 32 bits) | meaning |
|---|---|
| `L.weight_scale`, `L.scale_weight`, `L.weight_scale_inv` (), (N,) or (N, 1) | of the weight |
| `L.weight_scale_2` () | of `L.weight_scale` |
| `L.pre_quant_scale` (K,) | of the input |

Others dequantise the weights and leave the scales. Which of both it is, the values say: those of
weights are far below 1, and codes fill the range of their type.
"""
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...ops.formats import plain
from ...ops.formats.base import FormatError
from ...ops.tensor.packed_layout import is_packed, pack_16bit, scale_packed
from ...ops.tensor.packed_tensor import PackedTensor
from ...ops.tensor.row_slicing import dense, take_rows
from ..files.container import AGAIN, ProgressIter, WeightFile, describe, safe_repr
from ..name_lists import join_some
from .base import Quantizer, TypeOf
from .comfyui import SMOOTHING
from .comfyui_marks import MARK

OF_WEIGHT = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2")
PARTS = (*OF_WEIGHT, SMOOTHING)
# Largest root mean square of values that are weights; codes that are meant for a scale use the
# whole range of up to 448.
MAX_UNSCALED = 4.0
SAMPLE_VALUES = 65_536  # of a weight, that are read for its root mean square
TYPES = ("F16", "BF16", "F32")  # of weights in safetensors


def _is_in(names: Iterable[str], metadata: Mapping[str, Any], type_of: TypeOf) -> bool:
    names = dict.fromkeys(names)
    return any(type_of(f"{layer}.weight") in TYPES for layer in _scaled_layers(names))


def multiply_leftover_scales(file: WeightFile, tensors: dict[str, torch.Tensor],
                             track: ProgressIter = iter):
    """Multiplies weights by the scales beside them where these are needed, and drops the scales.

    Args:
        file: the file they come from; it gets a note where scales are left out.
        tensors: name -> tensor, weights joined with the scales that their format has; changed in
            place.
        track: as of `Quantizer.join`.

    Raises:
        WeightFileError: scales are needed and do not fit.
    """
    left_out = []
    for layer, names in _scaled_layers(tensors).items():
        weight = tensors[f"{layer}.weight"]
        is_codes = not is_packed(weight) and (
            f"{layer}{MARK}" in tensors or weight.dtype not in (torch.float32, *plain.BY_DTYPE))
        if not weight.ndim or is_codes:
            continue  # what reads the codes reads their scales too
        parts = {name: tensors.pop(f"{layer}.{name}") for name in names}
        parts = {name: part for name, part in parts.items() if not _is_one(part)}
        smoothing = parts.pop(SMOOTHING, None)
        if parts and root_mean_square(weight) <= MAX_UNSCALED:
            left_out.append(layer)
            parts = {}
        if parts or smoothing is not None:
            tensors[f"{layer}.weight"] = _multiplied(file, layer, weight, parts, smoothing)
    if left_out:
        file.note(f"{file.path.name}: scales are left out beside weights that look scaled already:"
                  f" {join_some(map(safe_repr, left_out))}.")


def root_mean_square(weight: torch.Tensor) -> float:
    """Returns the root mean square of a weight's first values."""
    if weight.ndim > 1 and weight.numel():
        rows = max(1, SAMPLE_VALUES // max(1, weight.shape[1:].numel()))
        weight = take_rows(weight, slice(0, min(rows, len(weight))))
    return dense(weight).float().square().mean().sqrt().item()


def _scaled_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns layer -> the last parts of the names of its scales, for those that have a weight."""
    names, layers = dict.fromkeys(names), dict[str, list[str]]()
    for name in names:
        layer, _, part = name.rpartition(".")
        if part in PARTS and f"{layer}.weight" in names:
            layers.setdefault(layer, []).append(part)
    return layers


def _is_one(scale: torch.Tensor) -> bool:
    return bool((dense(scale).float() == 1).all())


def _multiplied(file: WeightFile, layer: str, weight: torch.Tensor,
                scales: Mapping[str, torch.Tensor], smoothing: Any) -> torch.Tensor:
    """Returns a weight times its scales; 16 bits and codes stay as they are beneath them."""
    rows, columns = len(weight), weight.shape[1:]
    of_rows = torch.ones(1, dtype=torch.float32)
    for name, scale in scales.items():
        if scale.numel() != 1 and (scale.shape[:1] != (rows,) or scale.numel() != rows):
            raise _unfit_error(file, layer, weight, name, scale)
        of_rows = of_rows * dense(scale).float().flatten()
    of_columns = None
    if smoothing is not None:
        if smoothing.numel() != columns.numel():
            raise _unfit_error(file, layer, weight, SMOOTHING, smoothing)
        of_columns = dense(smoothing).float().flatten()
    packed: Any = weight if is_packed(weight) else pack_16bit(weight, torch.float32)
    if is_packed(packed):
        with contextlib.suppress(FormatError):  # its blocks do not divide its rows
            return scale_packed(packed, of_rows, of_columns)
    values = dense(packed).float() * of_rows.view(-1, *[1] * len(columns))
    return values if of_columns is None else values * of_columns.view(columns)


def _unfit_error(file: WeightFile, layer: str, weight: torch.Tensor | PackedTensor, name: str,
                 scale: torch.Tensor):
    return file.error_at(
        f"{layer}.{name}",
        f"{safe_repr(f'{layer}.{name}')} is {describe(scale)}, and {safe_repr(f'{layer}.weight')}"
        f" of {tuple(weight.shape)} needs it: expected"
        f" {'one for each column' if name == SMOOTHING else 'one number, or one for each row'}",
        AGAIN)


QUANTIZER = Quantizer(name="a tool that left scales beside its weights", is_in=_is_in,
                      join=multiply_leftover_scales)
