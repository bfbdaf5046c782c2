"""The `operations` class handed to the host: it builds a model of these layers.

Those of `layers` hold packed weights. All other layers are the host's own.
"""
import types

import comfy.ops
import torch

from .host_formats import MixedEmbedding, MixedLinear
from .layers import PACKED_LAYERS, MoEExperts


def packed_operations(value_dtype: torch.dtype | None = None, patch_dtype: torch.dtype | None = None,
                      mixed: bool = False, full_precision: bool = False, compute: str = "exact") -> type:
    """The class for the host's `custom_operations`. The two dtypes and `compute` are those of `PackedLayer`.

    mixed: the file also holds layers in the host's own quantised formats (`comfy_quant`), whose products are the host's.
    full_precision: those do not quantise their inputs, as in the host's text encoders.
    """
    options = {"value_dtype": value_dtype, "patch_dtype": patch_dtype, "compute": compute}
    base, layers = comfy.ops.manual_cast, list(PACKED_LAYERS)
    if mixed:
        quantised = types.SimpleNamespace(quant_config={"mixed_ops": True})
        base = comfy.ops.pick_operations(None, None, model_config=quantised)  # knows what the device can compute in
        base._full_precision_mm = full_precision
        layers[:2] = (type("Linear", (MixedLinear, base.Linear), {}), type("Embedding", (MixedEmbedding, base.Embedding), {}))
        layers.remove(MoEExperts)  # such a file has its experts in the host's format too
    layers = {layer.__name__: type(layer.__name__, (layer,), options) for layer in layers}
    return type("PackedOperations", (base,), layers)
