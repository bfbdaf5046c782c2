"""Loading, moving and unloading a model, in part too, with the patches of its packed layers."""
import comfy.utils
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from ..adapters import adapter_tensors, is_plain_lora
from .settling import SettlingPatcher


class LoadingPatcher(SettlingPatcher):
    """The methods of the host's patchers that load, move and unload."""

    _staying = {}  # while the host loads in dynamic VRAM: name -> (the host's backup of a weight, that weight on the device)

    # --- memory ---

    def _factor_bytes(self) -> int:
        """What the factors of this patcher's patches take on the device; about, as long as they are not built."""
        if self.model.packed_patches.layers and self.model.current_weight_patches_uuid == self.patches_uuid:
            return self.model.packed_patches.nbytes
        branch = self._branch_dtype().itemsize
        return sum(tensor.numel() * branch if is_plain_lora(patch[1]) else tensor.nbytes for key in self._packed_keys()
                   for patch in self._all_patches[key] for tensor in adapter_tensors(patch[1]))

    def model_size(self):
        return super().model_size() + self._factor_bytes()  # so that the host makes room for them

    def _offload_factors(self):
        """Free the device of what packed layers run. They go on with it from the offload device, until the next load."""
        applied = self.model.packed_patches
        of_hooks = {self._layer(key).lora for key in applied.before_hooks} - {None}
        for patches in {*applied.layers.values(), *of_hooks}:
            patches.offload(self.offload_device)
        applied.counted = 0

    # --- loading ---

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **dynamic):
        if self.is_dynamic():
            self._load_dynamic(device_to, lowvram_model_memory, **dynamic)
        else:
            self._load_static(device_to, lowvram_model_memory, force_patch_weights, full_load)
        if self.current_hooks is not None:
            self.patch_hooks(self.current_hooks)  # the host applied them while our patches were hidden

    def _load_static(self, device_to, budget, force_patch_weights, full_load):
        built = self._built(device_to)
        with self._packed_patches_hidden():
            if full_load:
                super().load(device_to, budget, force_patch_weights=force_patch_weights, full_load=True)
                self.model.model_loaded_weight_memory = super().model_size()  # the host took ours, with the factors
            else:
                self._load_in_part(device_to, max(1, budget - self._factor_bytes()), force_patch_weights)
        self._apply_all(device_to, built)

    def _load_in_part(self, device_to, budget, force_patch_weights):
        if device_to in (None, self.offload_device):
            super().load(device_to, budget, force_patch_weights=force_patch_weights)
        elif not force_patch_weights and self._keeps_its_place(device_to, budget):
            self.apply_hooks(self.forced_hooks, force_apply=True)
        else:
            with self._settled(device_to):
                self._plan(device_to, budget, force_patch_weights)

    def _plan(self, device_to, budget, force_patch_weights):
        """The host chooses which layers lie on the device, and loads them."""
        super().load(device_to, budget, force_patch_weights=force_patch_weights)

    def _load_dynamic(self, device_to, lowvram_model_memory, dirty=False):
        # The host's `dirty` uploads every weight again. Only weights that it patches itself need that, and new slots.
        before, built = self._slots(), self._built(device_to)
        staying = self._of_no_layer(device_to)
        self._take_all_off()
        self._staying = staying
        try:
            with self._packed_patches_hidden():
                super().load(device_to, lowvram_model_memory)
        finally:
            self._staying = {}
        for module, (slot, patched) in self._slots().items():
            old_slot, was_patched = before.get(module, (None, False))
            if slot is not old_slot or (dirty and (patched or was_patched)):
                module._v_signature = None
        self._apply_all(device_to, built)

    def _of_no_layer(self, device) -> dict:
        """Weights that lie on the device as they are in the file, which the host would send there again in each load."""
        found = {}
        for key, backup in self.backup.items():
            module = self.model.get_submodule(key.rpartition(".")[0])
            weight = comfy.utils.get_attr(self.model, key)
            if not hasattr(module, "comfy_cast_weights") and key not in self._all_patches and weight.device == device:
                found[key] = backup, weight
        return found

    def _slots(self) -> dict:
        """Module -> (its device memory, whether the host patches what lies there), in dynamic VRAM."""
        return {module: (module._v, any(getattr(module, f"{param}_lowvram_function", None) for param in ("weight", "bias")))
                for module in self.model.modules() if hasattr(module, "_v")}

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if not self.is_dynamic() and self._can_swap(device_to, force_patch_weights):
            before = self.loaded_size()
            with self.use_ejected(skip_and_inject_on_exit_only=True):
                try:
                    self._swap_patches(device_to)
                except Exception:
                    super().detach()
                    raise
            extra_memory -= self.loaded_size() - before  # which the factors have taken of it, or left
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
        for key, (backup, weight) in self._staying.items():
            self.backup[key] = backup
            comfy.utils.set_attr_param(self.model, key, weight)
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
