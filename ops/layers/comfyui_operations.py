"""Builds the `operations` class from which the host makes a model's layers.

Those of `layers` hold packed weights. All other layers are the host's own.
"""
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.ops

from ..stable_names import stable_pickle_name
from ..tensor.packed_layout import is_packed
from . import EXACT, FAST, INT8
from .comfy_quant_layers import MixedEmbedding, MixedLinear
from .fused_calls import keep_forward
from .packed_layers import (
    PACKED_LAYERS,
    MoEExperts,
    PackedLayer,
    become_packed,
    is_packable,
    make_packed,
)

WITHOUT_EXPERTS = "but experts"  # a value of `mixed`
# What the host's linear layer for its quantised formats has besides weight and bias.
HOST_ATTRIBUTES = ("factory_kwargs", "tensor_class", "quant_format", "layout_type", "_orig_shape",
                   "_full_precision_mm", "_full_precision_mm_config", "input_scale",
                   "pre_quant_scale")


def packed_operations(mixed: bool | str = False, full_precision: bool = False,
                      compute: str = EXACT) -> type:
    """Returns a class for the host's `custom_operations`, the same one for the same arguments.

    Args:
        mixed: the file also holds layers in the host's own quantised formats (`comfy_quant`), whose
            products are the host's; `WITHOUT_EXPERTS`: no experts among them.
        full_precision: those layers do not quantise their inputs, as in the host's text encoders.
        compute: see `PackedLayer`.
    """
    keep_forward()
    return _operations(mixed, full_precision, FAST if compute == INT8 else compute)


@functools.cache
def _operations(mixed: bool | str, full_precision: bool, compute: str) -> type:
    base: Any = comfy.ops.manual_cast
    layer_classes = list(PACKED_LAYERS)
    if mixed:
        quantized = types.SimpleNamespace(quant_config={"mixed_ops": True})
        # chooses by what the device can compute in
        base = comfy.ops.pick_operations(None, None, model_config=quantized)
        base._full_precision_mm = full_precision
        layer_classes[:2] = (
            type("Linear", (MixedLinear, base.Linear), {}),
            type("Embedding", (MixedEmbedding, base.Embedding), {}),
        )
        if mixed != WITHOUT_EXPERTS:  # such a file has its experts in the host's format too
            layer_classes.remove(MoEExperts)
    arguments = mixed, full_precision, compute
    layers = {
        layer.__name__: type(layer.__name__, (layer,),
                             {"compute": compute, "new": (new_layer, (layer.__name__, *arguments))})
        for layer in layer_classes
    }
    return type("PackedOperations", (base,), layers)


def operations_for(keys: Iterable[str], full_precision: bool = False,
                   compute: str = EXACT) -> type:
    """Returns `packed_operations` for a state dict.

    Args:
        keys: the state dict, or its keys.
        full_precision: see `packed_operations`.
        compute: see `PackedLayer`.
    """
    mixed = any(key.endswith(".comfy_quant") for key in keys)
    if mixed and isinstance(keys, Mapping) and any(
            is_packed(tensor) and tensor.ndim == 3 for tensor in keys.values()):
        mixed = WITHOUT_EXPERTS
    return packed_operations(mixed, full_precision, compute)


@stable_pickle_name
def new_layer(name: str, *arguments) -> PackedLayer:
    """Returns an uninitialised layer of the class `name` of `packed_operations(*arguments)`."""
    # pickles of version 0.2.1 have two dtypes before them
    layer_class = getattr(packed_operations(*arguments[-3:]), name)
    return layer_class.__new__(layer_class)


def takes_packed(layer: Any) -> bool:
    """Returns whether a layer, of the host or of this pack, can hold a packed weight once
    `hold_packed` has had it."""
    return isinstance(layer, PackedLayer) or is_packable(layer) or _is_of_host_formats(layer)


def hold_packed(layer: Any):
    """Makes a layer whose weight has become a packed one a packed layer, in place.

    Args:
        layer: for which `takes_packed` holds.
    """
    vars(layer).pop("compute", None)  # chosen for the weight that it had
    if not (_is_of_host_formats(layer) or isinstance(layer, MixedLinear)):
        make_packed(layer)
        return
    for name in HOST_ATTRIBUTES:
        for names in (layer._parameters, layer._buffers, vars(layer)):
            names.pop(name, None)
    become_packed(layer, packed_operations().Linear)


def _is_of_host_formats(layer: Any) -> bool:
    """Returns whether a layer is the linear one of the host for its quantised formats."""
    return isinstance(layer, comfy.ops.CastWeightBiasOp) and HOST_ATTRIBUTES[0] in vars(layer) and (
        type(layer).__name__ == "Linear") and not isinstance(layer, PackedLayer)
