"""Which patches packed layers run themselves, and how each layer gets them."""
import contextlib

import comfy.lora
import comfy.utils
import torch

from ..layers import PackedLayer
from ..lora import LayerPatches, build_patches, fitting
from ..tensor import QuantizedTensor


def _nothing_to_watch():
    """Weights in memory of their own stay what they are."""


class Applied:
    """What is applied to a model's packed layers now.

    layers: weight name -> LayerPatches. before_hooks: what hooks have replaced for the moment. nbytes: of the factors in
    `layers`. counted: of these, the bytes in the host's `model_loaded_weight_memory`. built_for: the patcher's patches_uuid and
    the device for which all of `layers` were built, or None. evicted: the host has taken the model off the device in the midst
    of a run. stored: whether layers lie in a store. step: what the first step of a run has shown, or None. room: bytes that
    the host had for it at the last load, its budget aside. order: what the places of the layers followed from then.
    watch: raises where what holds the weights is no longer what was loaded; called before each step.
    """

    def __init__(self):
        self.layers = {}
        self.before_hooks = {}
        self.nbytes = self.counted = 0
        self.built_for = None
        self.evicted = self.stored = False
        self.step = self.order = None
        self.room = float("inf")
        self.watch = _nothing_to_watch


class ApplyingPatcher:
    """A patcher whose packed layers run their patches. Loading, saving and hooks build on it."""

    _hidden = None  # all patches, while `patches` holds only those the host may see

    def _layer(self, key: str):
        return comfy.utils.get_attr(self.model, key.removesuffix(".weight"))

    def _packed_weight(self, key: str):
        """The packed weight named `key`, or None."""
        if not key.endswith(".weight"):
            return None
        layer = self._layer(key)
        return layer.weight if isinstance(layer, PackedLayer) and isinstance(layer.weight, QuantizedTensor) else None

    def _owns(self, key: str, patches: list) -> bool:
        """Whether these patches run in a packed layer. A weight that a patch reshapes is the host's to replace."""
        weight = self._packed_weight(key)
        return weight is not None and comfy.lora.calculate_shape(patches, weight, key) == weight.shape

    @property
    def _all_patches(self) -> dict:
        return self.patches if self._hidden is None else self._hidden

    def fitting_patches(self, key: str) -> list:
        """The patches of a weight without those that its packed layer leaves out, which are in no picture."""
        patches = self._all_patches.get(key, [])
        return fitting(key, patches, self._packed_weight(key).shape) if self._owns(key, patches) else patches

    def _packed_keys(self) -> list[str]:
        return [key for key, patches in self._all_patches.items() if self._owns(key, patches)]

    @contextlib.contextmanager
    def _packed_patches_hidden(self):
        """Inside this block the host does not see the patches of packed weights."""
        if self._hidden is not None:
            yield
            return
        packed = set(self._packed_keys())
        self._hidden = self.patches
        self.patches = {key: patches for key, patches in self.patches.items() if key not in packed}
        try:
            yield
        finally:
            self.patches, self._hidden = self._hidden, None

    def _build(self, key: str, patches: list, device, original_weights=None) -> LayerPatches | None:
        layer = self._layer(key)
        return build_patches(key, patches, layer.weight.shape, device, self._branch_dtype(), layer.has_branch, original_weights)

    def _branch_dtype(self) -> torch.dtype:
        dtype = self.object_patches.get("manual_cast_dtype")
        if dtype is None:  # text encoders do not say; their factors are cast at first use
            dtype = self.model.get_dtype_inference() if hasattr(self.model, "get_dtype_inference") else torch.float32
        return dtype

    def _hand_to_layer(self, key: str, patches: LayerPatches | None):
        """Let a layer run `patches`: in its product, or before the functions that wrap its weight."""
        layer = self._layer(key)
        functions = [function for function in layer.weight_function if not isinstance(function, LayerPatches)]
        if patches is not None and (functions or key in self.weight_wrapper_patches):
            layer.lora, layer.weight_function = None, [patches, *functions]
        else:
            layer.lora, layer.weight_function = patches, functions

    def _built(self, device) -> dict:
        """What layers run on this device already and are to run on, by names of weights: of these very patches."""
        applied = self.model.packed_patches
        if applied.built_for != (self.patches_uuid, device):
            return {}
        return {key: patches for key, patches in applied.layers.items() if not patches.offloaded}

    def _apply_all(self, device, built: dict | None = None):
        """Give every packed layer its patches, and count their factors as loaded. built: those that need not be sent again."""
        self._clear_all()
        for key in self._packed_keys():
            self._apply_one(key, device, (built or {}).get(key))
        self.model.packed_patches.built_for = self.patches_uuid, device

    def _apply_one(self, key: str, device, built: LayerPatches | None = None):
        """Give one packed layer its patches, and count their factors as loaded."""
        applied = self.model.packed_patches
        applied.built_for = None
        before = applied.layers.pop(key, None)
        built = built or self._build(key, self._all_patches[key], device)
        self._hand_to_layer(key, built)
        if built is not None:
            applied.layers[key] = built
        change = (built.nbytes if built is not None else 0) - (before.nbytes if before is not None else 0)
        applied.nbytes += change
        applied.counted += change
        self.model.model_loaded_weight_memory += change

    def _clear_all(self):
        """Free what packed layers run; the host sets its own counter of loaded memory."""
        applied = self.model.packed_patches
        for key in applied.layers.keys() | applied.before_hooks.keys():
            self._hand_to_layer(key, None)
        applied.layers, applied.before_hooks, applied.nbytes, applied.counted, applied.built_for = {}, {}, 0, 0, None
