"""Requests the kernels that a model's packed layers will use, while the model loads."""
from collections.abc import Iterator
from typing import Any

import torch

from .. import kernels
from ..formats.base import Format
from ..kernels.background import wait
from ..tensor.packed_layout import is_packed
from .packed_layers import PackedConv2d, PackedLayer, PackedLinear


def prepare_kernels(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None):
    """Has the kernels validated that a model's packed layers need, and tells the layers which load
    they are of.

    A kernel that is not requested here is requested when a layer first needs it.

    Args:
        model: a model of packed layers.
        device: the device it will run on.
        dtype: its compute dtype; None where that is not known yet, then nothing is requested.
    """
    load = kernels.request(device, _needed(model, dtype))
    for layer in _layers(model):
        layer.load = load


def await_kernels(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None,
                  seconds: float):
    """Has a model's kernels validated, waits for the verdicts, and has its layers use them.

    Args:
        model, device, dtype: as for `prepare_kernels`.
        seconds: to wait at most.
    """
    prepare_kernels(model, device, dtype)
    needed = _needed(model, dtype)
    wait(lambda: not kernels.are_pending(device, needed), seconds)
    prepare_kernels(model, device, dtype)


def _layers(model: torch.nn.Module) -> list[PackedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, PackedLayer)]


def _needed(model: torch.nn.Module, dtype: torch.dtype | None
            ) -> dict[tuple[str, Format | None, torch.dtype], None]:
    """Returns the cases that a model's layers need, each once."""
    return {} if dtype is None else dict.fromkeys(
        case for layer in _layers(model) if is_packed(layer.weight)
        for case in _cases(layer, dtype))


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
