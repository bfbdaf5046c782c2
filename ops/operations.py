"""The `operations` class handed to the host: it builds a model of these layers.

Those of `layers` hold packed weights. All other layers are the host's own.
"""
import functools
import types
from collections.abc import Iterable

import comfy.ops
import torch

from .comfy_quant_layers import MixedEmbedding, MixedLinear
from .layers import PACKED_LAYERS, MoEExperts, PackedLayer
from .pickle_names import stable_pickle_name


def packed_operations(value_dtype: torch.dtype | None = None,
                      patch_dtype: torch.dtype | None = None, mixed: bool = False,
                      full_precision: bool = False, compute: str = "exact") -> type:
    """The class for the host's `custom_operations`. The two dtypes and `compute` are those of
    `PackedLayer`.

    mixed: the file also holds layers in the host's own quantised formats (`comfy_quant`), whose
    products are the host's.
    full_precision: those do not quantise their inputs, as in the host's text encoders.
    """
    options = {"value_dtype": value_dtype, "patch_dtype": patch_dtype, "compute": compute}
    base, layers = comfy.ops.manual_cast, list(PACKED_LAYERS)
    if mixed:
        quantised = types.SimpleNamespace(quant_config={"mixed_ops": True})
        # knows what the device can compute in
        base = comfy.ops.pick_operations(None, None, model_config=quantised)
        base._full_precision_mm = full_precision
        layers[:2] = (
            type("Linear", (MixedLinear, base.Linear), {}),
            type("Embedding", (MixedEmbedding, base.Embedding), {}),
        )
        layers.remove(MoEExperts)  # such a file has its experts in the host's format too
    made_by = value_dtype, patch_dtype, mixed, full_precision, compute
    layers = {
        layer.__name__: type(layer.__name__, (layer,),
                             options | {"new": (new_layer, (layer.__name__, *made_by))})
        for layer in layers
    }
    return type("PackedOperations", (base,), layers)


def operations_for(keys: Iterable[str], *dtypes: torch.dtype | None, full_precision: bool = False,
                   compute: str = "exact") -> type:
    """Return `packed_operations` for a state dict of these keys; `dtypes` are its first two."""
    mixed = any(key.endswith(".comfy_quant") for key in keys)
    return packed_operations(*dtypes, mixed=mixed, full_precision=full_precision, compute=compute)


_operations = functools.cache(packed_operations)  # the same classes for all layers of a pickle


@stable_pickle_name
def new_layer(name: str, *made_by) -> PackedLayer:
    """A layer without anything in it, of a class that `packed_operations(*made_by)` has."""
    layer_class = getattr(_operations(*made_by), name)
    return layer_class.__new__(layer_class)
