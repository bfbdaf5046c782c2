"""The mixin over the host's model patchers that keeps packed weights packed while patches are applied.

Packed here are also weights in the host's own quantised formats, where they lie in one of our layers: the host would
quantise them again with every patch.

`patches` stays what the host made it. Only applying differs: while the host loads, moves or unloads a model, the patches of
packed weights are out of its sight, and each packed layer gets them as `LayerPatches` on its attribute `lora`. What is
applied right now lives on the model, which all clones of a patcher share, never on a patcher.
"""
import collections
import contextlib
import functools

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import LazyCastingParam, LowVramPatch
from comfy.patcher_extension import CallbacksMP

from .layers import PackedLayer
from .lora import LayerPatches, adapter_tensors, build_patches
from .patched_weights import PatchedWeights
from .tensor import QuantizedTensor, is_packed

Backup = collections.namedtuple("Dimension", ["weight", "inplace_update"])  # as the host keeps in `backup`


class Applied:
    """What is applied to a model's packed layers now.

    layers: weight name -> LayerPatches. before_hooks: what hooks have replaced for the moment. nbytes: of the factors in
    `layers`. counted: of these, the bytes in the host's `model_loaded_weight_memory`. evicted: the host has taken the model
    off the device in the midst of a run.
    """

    def __init__(self):
        self.layers = {}
        self.before_hooks = {}
        self.nbytes = self.counted = 0
        self.evicted = False


@functools.cache
def _packed_class(cls: type) -> type:
    return type(f"Packed{cls.__name__}", (PackedPatcher, cls), {})


def adopt(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Make a patcher of the host, freshly loaded or cloned, keep packed weights packed. Returns it."""
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _packed_class(type(patcher))
    if not hasattr(patcher.model, "packed_patches"):
        patcher.model.packed_patches = Applied()
    return patcher


class PackedPatcher:
    """The methods of `ModelPatcher` and `ModelPatcherDynamic` that would touch packed weights."""

    _hidden = None  # all patches, while `patches` holds only those the host may see

    # --- which patches are ours ---

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

    # --- building and applying ---

    def _build(self, key: str, patches: list, device, original_weights=None) -> LayerPatches | None:
        layer = self._layer(key)
        dtype = self.object_patches.get("manual_cast_dtype")
        if dtype is None:  # text encoders do not say; their factors are cast at first use
            dtype = self.model.get_dtype_inference() if hasattr(self.model, "get_dtype_inference") else torch.float32
        return build_patches(key, patches, layer.weight.shape, device, dtype, layer.has_branch, original_weights)

    def _hand_to_layer(self, key: str, patches: LayerPatches | None):
        """Let a layer run `patches`: in its product, or before the functions that wrap its weight."""
        layer = self._layer(key)
        functions = [function for function in layer.weight_function if not isinstance(function, LayerPatches)]
        if patches is not None and (functions or key in self.weight_wrapper_patches):
            layer.lora, layer.weight_function = None, [patches, *functions]
        else:
            layer.lora, layer.weight_function = patches, functions

    def _apply_all(self, device):
        """Give every packed layer its patches, and count their factors as loaded."""
        self._clear_all()
        for key in self._packed_keys():
            self._apply_one(key, device)

    def _apply_one(self, key: str, device):
        """Give one packed layer its patches, and count their factors as loaded."""
        applied = self.model.packed_patches
        before = applied.layers.pop(key, None)
        built = self._build(key, self._all_patches[key], device)
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
        applied.layers, applied.before_hooks, applied.nbytes, applied.counted = {}, {}, 0, 0

    def _offload_factors(self):
        """Free the device of what packed layers run. They go on with it from the offload device, until the next load."""
        applied = self.model.packed_patches
        of_hooks = {self._layer(key).lora for key in applied.before_hooks} - {None}
        for patches in {*applied.layers.values(), *of_hooks}:
            patches.offload(self.offload_device)
        applied.counted = 0

    def _factor_bytes(self) -> int:
        """What the factors of this patcher's patches take on the device; about, as long as they are not built."""
        if self.model.packed_patches.layers and self.model.current_weight_patches_uuid == self.patches_uuid:
            return self.model.packed_patches.nbytes
        return sum(tensor.nbytes for key in self._packed_keys() for patch in self._all_patches[key]
                   for tensor in adapter_tensors(patch[1]))

    def model_size(self):
        return super().model_size() + self._factor_bytes()  # so that the host makes room for them

    def clone(self, *args, **kwargs):
        clone = adopt(super().clone(*args, **kwargs))
        clone.size = self.size  # the host handed on model_size(), which counts this patcher's factors
        return clone

    # --- loading and unloading ---

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **dynamic):
        if self.is_dynamic():
            self._load_dynamic(device_to, lowvram_model_memory, **dynamic)
        else:
            factors = self._factor_bytes()
            budget = lowvram_model_memory if full_load else max(1, lowvram_model_memory - factors)
            with self._packed_patches_hidden():
                super().load(device_to, budget, force_patch_weights=force_patch_weights, full_load=full_load)
            self._drop_double_patches()
            if full_load:
                self.model.model_loaded_weight_memory = super().model_size()  # the host took ours, with the factors
            self._apply_all(device_to)
        if self.current_hooks is not None:
            self.patch_hooks(self.current_hooks)  # the host applied them while our patches were hidden

    def _drop_double_patches(self):
        """Where a loaded module falls out of the budget the host leaves its patched weights and patches them once more."""
        for module in self.model.modules():
            if getattr(module, "comfy_patched_weights", False) and hasattr(module, "weight_function"):
                for name in ("weight_function", "bias_function"):
                    functions = getattr(module, name)
                    setattr(module, name, [function for function in functions if not isinstance(function, LowVramPatch)])

    def _load_dynamic(self, device_to, lowvram_model_memory, dirty=False):
        # The host's `dirty` uploads every weight again. Only weights that it patches itself need that, and new slots.
        before = self._slots()
        self._take_all_off()
        with self._packed_patches_hidden():
            super().load(device_to, lowvram_model_memory)
        for module, (slot, patched) in self._slots().items():
            old_slot, was_patched = before.get(module, (None, False))
            if slot is not old_slot or (dirty and (patched or was_patched)):
                module._v_signature = None
        self._apply_all(device_to)

    def _slots(self) -> dict:
        """Module -> (its device memory, whether the host patches what lies there), in dynamic VRAM."""
        return {module: (module._v, any(getattr(module, f"{param}_lowvram_function", None) for param in ("weight", "bias")))
                for module in self.model.modules() if hasattr(module, "_v")}

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if not self.is_dynamic() and self._can_swap(device_to, force_patch_weights):
            with self.use_ejected(skip_and_inject_on_exit_only=True):
                try:
                    self._swap_patches(device_to)
                except Exception:
                    super().detach()
                    raise
        self.model.packed_patches.evicted = False
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)

    def _can_swap(self, device_to, force_patch_weights) -> bool:
        """Whether only patches differ from what is loaded, so that no base weight needs to move."""
        loaded = self.model.current_weight_patches_uuid
        force_cast = next((module.comfy_force_cast_weights for module in self.model.modules()
                           if hasattr(module, "comfy_force_cast_weights")), self.force_cast_weights)
        return (loaded is not None and loaded != self.patches_uuid and not force_patch_weights
                and self.model.device == device_to and force_cast == self.force_cast_weights)

    def _swap_patches(self, device_to):
        """Exchange the applied patches for this patcher's where the weights lie; the host then finds nothing to do."""
        self.unpatch_hooks()
        self.model.model_loaded_weight_memory -= self.model.packed_patches.counted
        for key, backup in self.backup.items():
            device = comfy.utils.get_attr(self.model, key).device
            comfy.utils.set_attr_param(self.model, key, backup.weight.to(device))
        self.backup.clear()
        with self._packed_patches_hidden():
            for name, module in self.model.named_modules():
                self._swap_host_patches(name, module, device_to)
        self._apply_all(device_to)
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, False, False)

    def _swap_host_patches(self, name: str, module, device_to):
        """Patches of one module that the host applies, as its own `load` leaves them."""
        resident = getattr(module, "comfy_patched_weights", False)
        for param, _ in module.named_parameters(recurse=False):
            key = f"{name}.{param}"
            functions = []
            if key in self.patches and not resident:
                _, set_func, convert_func = comfy.model_patcher.get_key_weight(self.model, key)
                functions.append(LowVramPatch(key, self.patches, convert_func, set_func))
            elif key in self.patches:
                self.patch_weight_to_device(key, device_to=device_to)
            if hasattr(module, f"{param}_function"):
                setattr(module, f"{param}_function", functions + self.weight_wrapper_patches.get(key, []))

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._take_all_off()

    def _take_all_off(self):
        """Put back what a load has replaced, and free what packed layers run."""
        if self.is_dynamic():
            super().restore_loaded_backups()
        self._clear_all()

    def restore_loaded_backups(self):
        """Dynamic VRAM frees what a load has put on the device, also in the midst of a run, which goes on with its patches.

        Returns the freed bytes. The host would put unpatched weights back.
        """
        patched = {key: (self.backup[key], comfy.utils.get_attr(self.model, key)) for key, patches in self._all_patches.items()
                   if key in self.backup and not self._owns(key, patches)}
        restored = super().restore_loaded_backups()
        for key, (backup, weight) in patched.items():
            self.backup[key] = backup
            comfy.utils.set_attr_param(self.model, key, weight.to(self.offload_device))
        self._offload_factors()
        return restored

    def partially_unload(self, *args, **kwargs):
        with self._packed_patches_hidden():
            return super().partially_unload(*args, **kwargs)

    def detach(self, unpatch_all=True):
        if unpatch_all and getattr(self.model, "current_patcher", None) is not None:
            return self._evict()
        return super().detach(unpatch_all)

    def _evict(self):
        """Free the device of a model in the midst of a run, whose next step finds weights and patches on the offload device.

        The host would take the patches off with the weights, and the rest of the run would go on without them.
        """
        self.partially_unload_ram(1e32)
        self.partially_unload(self.offload_device, 1e32)
        self._offload_factors()
        self.model.model_loaded_weight_memory = 0
        self.model.packed_patches.evicted = True
        return self.model

    def cleanup(self):
        super().cleanup()
        if self.model.packed_patches.evicted:  # the host no longer knows the model as loaded
            self.detach()

    # --- single weights: pinning, saving, forced moves ---

    def pin_weight_to_device(self, key):
        weight = self._packed_weight(key)
        if weight is None:
            super().pin_weight_to_device(key)
        elif comfy.model_management.pin_memory(weight._qdata):
            self.pinned.add(key)

    def unpin_weight(self, key):
        weight = self._packed_weight(key)
        if weight is None:
            super().unpin_weight(key)
        elif key in self.pinned:
            comfy.model_management.unpin_memory(weight._qdata)
            self.pinned.remove(key)

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        patches = self._all_patches.get(key, [])
        weight = self._packed_weight(key)
        if weight is None or not self._owns(key, patches):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight:
            dense = self._layer(key).dense_weight(weight.to(device_to), torch.float32)
            return comfy.lora.calculate_weight(patches, dense, key).to(weight.dtype)
        if force_cast:
            if key not in self.backup:
                self.backup[key] = Backup(weight.to(self.offload_device), False)
            comfy.utils.set_attr_param(self.model, key, weight.to(device_to))
        elif patches and self._hidden is None:  # a loader that is not the host's asks weight by weight
            self._apply_one(key, device_to)
        return weight

    def model_state_dict(self, filter_prefix=None):
        weights = super().model_state_dict(filter_prefix)

        def patched(key: str) -> torch.Tensor:
            return self.patch_weight_to_device(key, weights[key].device, return_weight=True)

        lazy = [key for key in weights if self._packed_weight(key) is not None
                or (key in self._all_patches and key not in self.backup)]  # those in `backup` are patched where they lie
        return PatchedWeights(weights, lazy, patched)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        state_dict = super().model_state_dict_for_saving(model, prefix)
        for name in list(state_dict):
            key = prefix + name
            weight = self._packed_weight(key)
            if weight is None:
                continue
            layer, start = self._layer(key), name.removesuffix("weight")
            for part in layer._parameters.keys() - {"bias"}:
                state_dict.pop(start + part, None)
            if is_packed(weight) or key in self._all_patches:  # written dense, one at a time, with its patches
                state_dict[name] = LazyCastingParam(self, key, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
            else:
                state_dict |= layer.quantised_parts(start)
        return state_dict

    # --- hooks ---

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if self._packed_weight(key) is None:
            self._make_writable(key)
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        patches = self._all_patches.get(key, []) + combined_patches[key]
        patches = self._build(key, patches, self.load_device, {key: original_weights.pop(key)})
        self._hand_over_for_hooks(key, patches)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            self.cached_hook_patches.setdefault(hooks, {})[key] = patches

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        if isinstance(cached_weights[key], (LayerPatches, type(None))):
            self._hand_over_for_hooks(key, cached_weights[key])
        else:
            self._make_writable(key)
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def _make_writable(self, key: str):
        """Hooks of the host write into dense weights where they lie, which may be in a mapped file."""
        if not self.is_dynamic() and key not in self.hook_backup:
            self.unpin_weight(key)
            comfy.utils.set_attr_param(self.model, key, comfy.utils.get_attr(self.model, key).clone())

    def _hand_over_for_hooks(self, key: str, patches: LayerPatches | None):
        applied = self.model.packed_patches
        applied.before_hooks.setdefault(key, applied.layers.get(key))
        self._hand_to_layer(key, patches)

    def unpatch_hooks(self, whitelist_keys_set=None):
        before_hooks = self.model.packed_patches.before_hooks
        for key in list(before_hooks):
            if not whitelist_keys_set or key in whitelist_keys_set:
                self._hand_to_layer(key, before_hooks.pop(key))
        super().unpatch_hooks(whitelist_keys_set)
