"""Which patches packed layers run themselves, and how each layer gets them."""
import comfy.lora
import comfy.utils
import torch

from ..adapters import adapter_tensors, is_plain_lora
from ..layer_patches import LayerPatches, build_patches
from ..layers import PackedLayer
from ..packed_layout import QuantizedTensor
from ..packed_tensor import PackedTensor


def layer_of(patcher, key: str) -> torch.nn.Module:
    """Return the layer whose weight is named `key`."""
    return comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))


def packed_weight(patcher, key: str) -> PackedTensor | None:
    """Return the packed weight named `key`, or None where no packed layer has one of that name."""
    if not key.endswith(".weight"):
        return None
    layer = layer_of(patcher, key)
    is_packed = isinstance(layer, PackedLayer) and isinstance(layer.weight, QuantizedTensor)
    return layer.weight if is_packed else None


def runs_in_layer(patcher, key: str, patches: list) -> bool:
    """Whether these patches run in a packed layer. One that reshapes a weight is the host's."""
    weight = packed_weight(patcher, key)
    return weight is not None and comfy.lora.calculate_shape(patches, weight, key) == weight.shape


def packed_keys(patcher) -> list[str]:
    """Return the names of the weights whose patches run in packed layers."""
    patches = patcher.all_patches
    return [key for key in patches if runs_in_layer(patcher, key, patches[key])]


def build(patcher, key: str, patches: list, device, original_weights=None) -> LayerPatches | None:
    """Return what the layer of `key` runs for a list of patches, or None where none is left."""
    layer = layer_of(patcher, key)
    shape, dtype = layer.weight.shape, branch_dtype(patcher)
    return build_patches(key, patches, shape, device, dtype, layer.has_branch, original_weights)


def branch_dtype(patcher) -> torch.dtype:
    """Return the dtype that the model computes in, and the factors of LoRAs are held in."""
    dtype = patcher.object_patches.get("manual_cast_dtype")
    if dtype is None:  # text encoders do not say; their factors are cast at first use
        get_dtype = getattr(patcher.model, "get_dtype_inference", None)
        dtype = torch.float32 if get_dtype is None else get_dtype()
    return dtype


def factor_bytes(patcher) -> int:
    """Return what the factors of a patcher's patches take on the device; roughly, until built."""
    applied = patcher.model.packed_patches
    if applied.layers and patcher.model.current_weight_patches_uuid == patcher.patches_uuid:
        return applied.nbytes
    itemsize = branch_dtype(patcher).itemsize
    values = [patch[1] for key in packed_keys(patcher) for patch in patcher.all_patches[key]]
    return sum(tensor.numel() * itemsize if is_plain_lora(value) else tensor.nbytes
               for value in values for tensor in adapter_tensors(value))


class FactorCache:
    """What was built for all packed layers at once: the next load need not send it again."""

    def __init__(self):
        self.clear()

    def clear(self):
        self._built, self._built_for = {}, None

    def put(self, built: dict[str, LayerPatches], patches_uuid, device):
        self._built, self._built_for = dict(built), (patches_uuid, device)

    def get(self, patches_uuid, device) -> dict[str, LayerPatches]:
        """Return what lies on this device of these very patches, by names of weights."""
        if self._built_for != (patches_uuid, device):
            return {}
        return {key: patches for key, patches in self._built.items() if not patches.offloaded}


def _always_unchanged():
    """Weights in memory of their own stay what they are."""


class AppliedPatches:
    """What is applied to the packed layers of one model now.

    layers: weight name -> LayerPatches. saved_by_hooks: what hooks have replaced for the moment.
    nbytes: of the factors in `layers`. counted: of these, the bytes in the host's
    `model_loaded_weight_memory`. evicted: the host has taken the model off the device in the midst
    of a run. watch: raises where what holds the weights is no longer what was loaded; called before
    each step.
    """

    def __init__(self):
        self.layers, self.saved_by_hooks = {}, {}
        self.nbytes = self.counted = 0
        self.evicted = False
        self.check_source = _always_unchanged
        self.cache = FactorCache()

    def apply_all(self, patcher, device, built: dict[str, LayerPatches] | None = None):
        """Give every packed layer its patches, and count their factors as loaded.

        built: those that need not be built and sent again, by names of weights.
        """
        self.clear(patcher)
        for key in packed_keys(patcher):
            self.apply_one(patcher, key, device, (built or {}).get(key))
        self.cache.put(self.layers, patcher.patches_uuid, device)

    def apply_one(self, patcher, key: str, device, built: LayerPatches | None = None):
        """Give one packed layer its patches, and count their factors as loaded."""
        self.cache.clear()
        before = self.layers.pop(key, None)
        built = built or build(patcher, key, patcher.all_patches[key], device)
        self._assign(patcher, key, built)
        if built is not None:
            self.layers[key] = built
        change = (built.nbytes if built is not None else 0) - (
            before.nbytes if before is not None else 0
        )
        self.nbytes += change
        self.counted += change
        patcher.model.model_loaded_weight_memory += change

    def clear(self, patcher):
        """Free what packed layers run; the host sets its own counter of loaded memory."""
        for key in self.layers.keys() | self.saved_by_hooks.keys():
            self._assign(patcher, key, None)
        self.layers, self.saved_by_hooks, self.nbytes, self.counted = {}, {}, 0, 0
        self.cache.clear()

    def offload(self, patcher):
        """Free the device of what packed layers run. They go on with it from the offload device,
        until the next load."""
        of_hooks = {layer_of(patcher, key).lora for key in self.saved_by_hooks} - {None}
        for patches in {*self.layers.values(), *of_hooks}:
            patches.offload(patcher.offload_device)
        self.counted = 0

    def replace_for_hooks(self, patcher, key: str, patches: LayerPatches | None):
        """Let a layer run `patches` until `restore_after_hooks`."""
        self.saved_by_hooks.setdefault(key, self.layers.get(key))
        self._assign(patcher, key, patches)

    def restore_after_hooks(self, patcher, keys=None):
        """Give layers back what they ran before hooks: those of `keys`, or all."""
        for key in list(self.saved_by_hooks):
            if not keys or key in keys:
                self._assign(patcher, key, self.saved_by_hooks.pop(key))

    def _assign(self, patcher, key: str, patches: LayerPatches | None):
        """Let a layer run `patches`: in its product, or before the functions that wrap its
        weight."""
        layer = layer_of(patcher, key)
        functions = [
            function for function in layer.weight_function
            if not isinstance(function, LayerPatches)
        ]
        if patches is not None and (functions or key in patcher.weight_wrapper_patches):
            layer.lora, layer.weight_function = None, [patches, *functions]
        else:
            layer.lora, layer.weight_function = patches, functions
