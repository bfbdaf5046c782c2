"""Hands each packed layer the patches that it runs itself."""
from collections.abc import Callable, Collection
from typing import Any

import comfy.lora
import comfy.utils
import torch

from ..layers.packed_layers import Embedding, PackedLayer
from ..patches.adapters import adapter_tensors, is_plain_lora
from ..patches.layer_patches import LayerPatches, build_patches
from ..tensor.packed_layout import QuantizedTensor

HEAD = "lm_head.weight"  # of a text encoder that writes texts: the host multiplies by it itself


def layer_of(patcher, key: str) -> Any:
    """Returns the layer, ours or the host's, whose weight is named `key`."""
    return comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))


def find_packed_weight(patcher, key: str) -> QuantizedTensor | None:
    """Returns the packed weight named `key`, or None where no packed layer has one of that name."""
    if not key.endswith(".weight"):
        return None
    layer = layer_of(patcher, key)
    if isinstance(layer, PackedLayer) and isinstance(layer.weight, QuantizedTensor):
        return layer.weight
    return None


def runs_in_layer(patcher, key: str, patches: list) -> bool:
    """Whether these patches run in a packed layer; the host applies those that reshape a weight."""
    weight = find_packed_weight(patcher, key)
    return weight is not None and comfy.lora.calculate_shape(patches, weight, key) == weight.shape


def packed_keys(patcher) -> list[str]:
    """Returns the names of the weights whose patches run in packed layers."""
    patches = patcher.all_patches
    return [key for key in patches if runs_in_layer(patcher, key, patches[key])]


def build(patcher, key: str, patches: list, device: torch.device,
          original_weights: dict | None = None) -> LayerPatches | None:
    """Builds what the layer of `key` runs for a list of patches; None if no patch is usable."""
    layer = layer_of(patcher, key)
    shape, dtype = layer.weight.shape, branch_dtype(patcher)
    return build_patches(key, patches, shape, device, dtype, layer.has_branch, original_weights)


def branch_dtype(patcher) -> torch.dtype:
    """Returns the dtype that the model computes in, which LoRA factors are kept in."""
    dtype = patcher.object_patches.get("manual_cast_dtype")
    if dtype is None:  # text encoders name no dtype; their factors are cast at first use
        get_dtype = getattr(patcher.model, "get_dtype_inference", None)
        dtype = torch.float32 if get_dtype is None else get_dtype()
    return dtype


def factor_bytes(patcher) -> int:
    """Returns the bytes of a patcher's LoRA factors on the device, estimated until built."""
    applied = patcher.model.packed_patches
    if applied.layers and patcher.model.current_weight_patches_uuid == patcher.patches_uuid:
        return applied.nbytes
    itemsize = branch_dtype(patcher).itemsize
    values = [patch[1] for key in packed_keys(patcher) for patch in patcher.all_patches[key]]
    return sum(tensor.numel() * itemsize if is_plain_lora(value) else tensor.nbytes
               for value in values for tensor in adapter_tensors(value))


def _accept_source():
    """Checks nothing: weights that are not in a mapped file cannot change."""


class AppliedPatches:
    """The patches applied to the packed layers of one model now.

    Attributes:
        layers: Weight name -> its `LayerPatches`.
        saved_by_hooks: Weight name -> the patches that a hook has replaced for now.
        nbytes: Bytes of the factors in `layers`.
        counted: Those of `nbytes` that the host's `model_loaded_weight_memory` includes.
        evicted: Whether the host took the model off the device in the middle of a run.
        check_source: Raises if the file behind the weights has changed; called before each load
            and each step.
        dtypes: That the model may compute in, where it does not say so itself.
        logged: What the log said last of layers that run in float because of their patches.
    """

    def __init__(self):
        self.layers: dict[str, LayerPatches] = {}
        self.saved_by_hooks: dict[str, LayerPatches | None] = {}
        self.nbytes = 0
        self.counted = 0
        self.evicted = False
        self.check_source: Callable[[], None] = _accept_source
        self.dtypes: tuple[torch.dtype, ...] = ()
        self.logged: str | None = None
        self._built_for: tuple | None = None  # (patches_uuid, device) of all `layers`, where alike

    def reusable(self, patches_uuid, device) -> dict[str, LayerPatches]:
        """Returns those of `layers` that a load of the same patches can use again on a device."""
        if self._built_for != (patches_uuid, device):
            return {}
        return {key: patches for key, patches in self.layers.items() if not patches.offloaded}

    def apply_all(self, patcher, device, built: dict[str, LayerPatches] | None = None):
        """Gives every packed layer its patches, and counts their factors as loaded.

        Args:
            patcher: The patcher whose patches are applied.
            device: Where the factors go.
            built: Patches to reuse, by weight name, as `reusable` returns them.
        """
        self.clear(patcher)
        for key in packed_keys(patcher):
            self.apply_one(patcher, key, device, (built or {}).get(key))
        self._built_for = patcher.patches_uuid, device

    def apply_one(self, patcher, key: str, device, built: LayerPatches | None = None):
        """Gives one packed layer its patches, and counts their factors as loaded."""
        self._built_for = None
        before = self.layers.pop(key, None)
        built = built or build(patcher, key, patcher.all_patches[key], device)
        self._assign(patcher, key, built)
        if built is not None:
            self.layers[key] = built
        change = _nbytes(built) - _nbytes(before)
        self.nbytes += change
        self.counted += change
        patcher.model.model_loaded_weight_memory += change

    def clear(self, patcher):
        """Frees the patches of packed layers; the host resets its own counter of loaded memory."""
        for key in self.layers.keys() | self.saved_by_hooks.keys():
            self._assign(patcher, key, None)
        self.layers = {}
        self.saved_by_hooks = {}
        self.nbytes = 0
        self.counted = 0
        self._built_for = None

    def offload(self, patcher):
        """Moves the patches off the device; layers copy them in at each run until the next load."""
        of_hooks = {layer_of(patcher, key).lora for key in self.saved_by_hooks} - {None}
        for patches in {*self.layers.values(), *of_hooks}:
            patches.offload(patcher.offload_device)
        self.counted = 0

    def replace_for_hooks(self, patcher, key: str, patches: LayerPatches | None):
        """Makes a layer run `patches` until `restore_after_hooks`."""
        self.saved_by_hooks.setdefault(key, self.layers.get(key))
        self._assign(patcher, key, patches)

    def restore_after_hooks(self, patcher, keys: Collection[str] | None = None):
        """Restores the patches that hooks replaced, for the weights in `keys` or for all."""
        for key in list(self.saved_by_hooks):
            if not keys or key in keys:
                self._assign(patcher, key, self.saved_by_hooks.pop(key))

    def _assign(self, patcher, key: str, patches: LayerPatches | None):
        """Makes a layer run `patches`: in its product, or before functions that wrap its weight.

        Of an embedding, whose weight the host may take for a product, also as such a function.
        """
        layer = layer_of(patcher, key)
        functions = [
            function for function in layer.weight_function
            if not isinstance(function, LayerPatches)
        ]
        if patches is not None and (functions or key in patcher.weight_wrapper_patches
                                    or key.endswith(HEAD)):
            layer.lora = None
            layer.weight_function = [patches, *functions]
        else:
            layer.lora = patches
            is_function = patches is not None and isinstance(layer, Embedding)
            layer.weight_function = [patches] if is_function else functions


def _nbytes(patches: LayerPatches | None) -> int:
    return 0 if patches is None else patches.nbytes
