"""Requests the kernels that a model's packed layers will use, while the model loads."""
from collections.abc import Iterator
from typing import Any

import torch

from .. import kernels
from ..formats.base import Format
from ..layers.packed_layers import PackedConv2d, PackedLayer, PackedLinear
from ..tensor.packed_layout import is_packed


def prepare_kernels(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None):
    """Has the kernels validated that a model's packed layers need, and tells the layers which load
    they are of.

    A kernel that is not requested here is requested when a layer first needs it.

    Args:
        model: a model of packed layers.
        device: the device it will run on.
        dtype: its compute dtype; None where that is not known yet, then nothing is requested.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    needed = {} if dtype is None else dict.fromkeys(
        case for layer in layers if is_packed(layer.weight) for case in _cases(layer, dtype))
    load = kernels.request(device, needed)
    for layer in layers:
        layer.load = load


def _cases(layer: PackedLayer, dtype: torch.dtype
           ) -> Iterator[tuple[str, Format | None, torch.dtype]]:
    weight: Any = layer.weight
    for packed_format in weight.params.format.formats_within():
        yield "dequantize", packed_format, dtype
        if isinstance(layer, (PackedLinear, PackedConv2d)):
            yield "linear", packed_format, dtype
        if isinstance(layer, PackedLinear) and layer.compute == "int8":
            yield "int8_rows", packed_format, torch.int8
    if layer.compute == "int8":
        yield "int8_tokens", None, dtype
