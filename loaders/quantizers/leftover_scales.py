"""Multiplies weights by scales that stand beside them although their type does not need any.

Converters that do not know a quantised format copy its parts one by one: the codes become weights
in Q8_0 or F16, and their scales (`PARTS`) stay beside them: of the weight, `weight_scale_2` of
these, and `pre_quant_scale` of the input.

Others dequantise the weights and leave the scales. Which of both it is, the values say: those of
weights are far below 1, and codes fill the range of their type.
"""
import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from ...ops.formats import plain
from ...ops.formats.base import FormatError
from ...ops.tensor.packed_layout import is_packed, pack_16bit, scale_packed
from ...ops.tensor.row_slicing import dense, take_rows
from ..container.weight_file import WeightFile, safe_repr
from ..name_lists import join_some
from .base import HeaderOf, Layer, Quantizer, Read, scaled_layers
from .comfy_quant_formats import SMOOTHING
from .parts import Part

WEIGHT_SCALES = ("weight_scale", "scale_weight", "weight_scale_inv", "weight_scale_2")
SCALES = (*WEIGHT_SCALES, SMOOTHING)
_WEIGHT = {"weight": Part("(N, K...)"), SMOOTHING: Part("K", optional=SMOOTHING)}
PARTS = {
    "multiplied": _WEIGHT | {name: Part("1 or (N, 1...)", optional=name) for name in WEIGHT_SCALES},
    "left out": _WEIGHT | {name: Part("", optional=name) for name in WEIGHT_SCALES},
}
# Largest root mean square of values that are weights; codes that are meant for a scale use the
# whole range of up to 448.
MAX_UNSCALED = 4.0
SAMPLE_VALUES = 65_536  # of a weight, that are read for its root mean square
DENSE_DTYPES = (torch.float32, *plain.PLAIN_FORMATS)  # of weights, others are codes


def find(names: Collection[str], metadata: Mapping[str, Any],
         header_of: HeaderOf) -> Iterator[str]:
    """Yields the layers with weights of 16 or 32 bits, or packed, and scales."""
    for layer in scaled_layers(names, SCALES):
        weight = header_of(f"{layer}.weight")
        if weight.dtype in DENSE_DTYPES and len(weight.shape):
            yield layer


def layout(layer: Layer) -> str:
    """Drops scales of 1, and returns whether the others are multiplied or left out."""
    layer.parts = {name: part for name, part in layer.parts.items()
                   if name == "weight" or not bool((dense(part).float() == 1).all())}
    has_scales = any(name in layer.parts for name in WEIGHT_SCALES)
    is_scaled = has_scales and root_mean_square(layer.parts["weight"]) <= MAX_UNSCALED
    return "left out" if is_scaled else "multiplied"


@contextlib.contextmanager
def session(file: WeightFile, tensors: Mapping[str, torch.Tensor]) -> Iterator[Read]:
    """Gives `read`, and notes the layers whose scales were left out."""
    left_out = []

    def read_and_note(layer: Layer) -> torch.Tensor:
        left_out.extend([layer.name] if layer.layout == "left out" else [])
        return read(layer)

    yield read_and_note
    if left_out:
        file.note(f"{file.path.name}: scales are left out, as their weights look scaled already:"
                  f" {join_some(map(safe_repr, left_out))}.")


def root_mean_square(weight: torch.Tensor) -> float:
    """Returns the root mean square of a weight's first values."""
    if weight.ndim > 1 and weight.numel():
        rows = max(1, SAMPLE_VALUES // max(1, weight.shape[1:].numel()))
        weight = take_rows(weight, slice(0, min(rows, len(weight))))
    return dense(weight).float().square().mean().sqrt().item()


def read(layer: Layer) -> torch.Tensor:
    """Returns a weight times its scales; 16 bits and codes stay as they are beneath them."""
    weight = layer.parts["weight"]
    names = () if layer.layout == "left out" else WEIGHT_SCALES
    scales = [layer.parts[name] for name in names if name in layer.parts]
    smoothing = layer.parts.get(SMOOTHING)
    if smoothing is None and not scales:
        return weight
    of_rows = torch.ones(1, dtype=torch.float32)
    for scale in scales:
        of_rows = of_rows * dense(scale).float().flatten()
    of_columns = None if smoothing is None else dense(smoothing).float().flatten()
    packed: Any = weight if is_packed(weight) else pack_16bit(weight, torch.float32)
    if is_packed(packed):
        with contextlib.suppress(FormatError):  # its blocks do not divide its rows
            return scale_packed(packed, of_rows, of_columns)
    values = dense(packed).float() * of_rows.view(-1, *[1] * (weight.ndim - 1))
    return values if of_columns is None else values * of_columns.view(weight.shape[1:])


QUANTIZER = Quantizer(name="a tool that left scales next to its weights", find=find, layouts=PARTS,
                      layout=layout, session=session)
