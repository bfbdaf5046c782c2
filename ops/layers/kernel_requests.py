"""Decides, before a step, which kernels a model's packed layers use in it."""
from collections.abc import Iterator
from typing import Any

import torch

from .. import kernels
from ..tensor.packed_layout import is_packed
from . import FAST
from .cpu_attention import attention
from .packed_layers import Embedding, MoEExperts, PackedConv2d, PackedLayer, PackedLinear

MULTIPLYING = PackedLinear, PackedConv2d, MoEExperts, Embedding  # text is generated with a table


def prepare_kernels(patcher: Any, device: torch.device | None = None, makes_room: bool = False):
    """Decides the kernels that a model's packed layers need and no model before it has needed.

    Args:
        patcher: A `PackedPatcher`.
        device: That the model will run on; None: the patcher's.
        makes_room: See `kernels.decide`.
    """
    get_dtype = getattr(patcher.model, "get_dtype_inference", None)
    dtypes = {*patcher.model.packed_patches.dtypes} if get_dtype is None else {
        patcher.object_patches.get("manual_cast_dtype") or get_dtype()}
    needed: dict[kernels.Need, None] = {}
    for layer in patcher.model.modules():
        if isinstance(layer, PackedLayer) and is_packed(layer.weight):
            # patches are added in float32, and some layers of the host compute in it
            for dtype in {*(dtypes or [layer.weight.dtype]), torch.float32}:
                needed |= dict.fromkeys(_needed_by(layer, dtype))
    options = patcher.model_options.get("transformer_options", {})
    if needed and options.get("optimized_attention_override") is attention:
        needed |= dict.fromkeys(("attention", None, dtype) for dtype in dtypes)
    kernels.decide(device or patcher.load_device, needed, makes_room)


def _needed_by(layer: PackedLayer, dtype: torch.dtype) -> Iterator[kernels.Need]:
    """Yields what a layer needs to compute in a dtype."""
    weight: Any = layer.weight
    for packed_format in weight.params.format.formats_within():
        yield "dequantize", packed_format, dtype
        if isinstance(layer, MULTIPLYING):
            yield "linear", packed_format, dtype
        if layer.compute == FAST:
            yield "int8_rows", packed_format, torch.int8
    if layer.compute == FAST:
        yield "int8_tokens", None, dtype
    if isinstance(layer, PackedConv2d):
        yield "channels_last", None, dtype
    if dtype.itemsize == 2:
        yield "add_rounded", None, dtype
