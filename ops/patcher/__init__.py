"""Mixin over the host's model patchers: applies patches while packed weights stay packed.

Weights in the host's own quantised formats count as packed too if they are in one of our layers:
the host would quantise them again with every patch.

`patches` stays what the host made it. Only applying differs: while the host loads, moves or unloads
a model, it does not see the patches of packed weights, and each packed layer gets them as
`LayerPatches` on its attribute `lora`. What clones of a patcher share lies on their model, never on
a patcher: the patches applied right now (`applied_patches`) and the layers that stay on the device
(`residency`).
"""
import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP

from ..layers.kernel_requests import prepare_kernels
from ..log import log
from ..patches.layer_patches import LayerPatches, usable_patches
from . import patched_weights
from .applied_patches import (
    AppliedPatches,
    build,
    factor_bytes,
    find_packed_weight,
    layer_of,
    packed_keys,
    runs_in_layer,
)
from .float_products import float_layers_text
from .residency import UNLOAD_ALL, MemoryReport, Placement, Residency, buffer_bytes
from .vram_accounting import accounted, make_pinnable, nothing_to_plan

# Type checkers see a subclass of the host's; `_packed_class` makes the real one.
_HostPatcher = comfy.model_patcher.ModelPatcherDynamic if TYPE_CHECKING else object

Backup = collections.namedtuple("Backup", ["weight", "inplace_update"])  # as the host keeps them


class PackedPatcher(_HostPatcher):
    """Overrides the methods of `ModelPatcher` and `ModelPatcherDynamic` that touch packed weights.

    Attributes:
        placement: How much of the model stays on its device; None leaves that to the host.
        on_placement: Called with the patcher and its `MemoryReport` after each load and at the end
            of each run.
        on_patches: Called with the patcher and the patches that are added to it, such as a LoRA's.
    """

    placement: Placement | None = None
    on_placement: Callable[["PackedPatcher", MemoryReport], None] | None = None
    on_patches: ClassVar[Callable[["PackedPatcher", Mapping], None]] = staticmethod(
        lambda patcher, patches: None)
    _unfiltered_patches: dict | None = None  # set while `patches` holds only what the host may see

    # Set while the host loads or unloads:
    load_list_override: list[tuple] | None = None  # the layers that the host is shown
    deferred_pins: list[str] | None = None  # collects the names of weights the host would pin
    # in dynamic VRAM: name -> (the host's backup of the weight, the weight on the device)
    resident_weights: dict[str, tuple] | None = None

    @property
    def _applied(self) -> AppliedPatches:
        return self.model.packed_patches

    @property
    def _residency(self) -> Residency:
        return self.model.packed_residency

    def clone(self, *args, **kwargs):
        clone = adopt(super().clone(*args, **kwargs))
        clone.size = self.size  # the host set it to model_size(), which counts LoRA factors
        clone.placement = self.placement
        clone.on_placement = self.on_placement
        return clone

    # --- patches ---

    def add_patches(self, patches, *args, **kwargs):
        added = super().add_patches(patches, *args, **kwargs)
        type(self).on_patches(self, patches)
        return added

    @property
    def all_patches(self) -> dict:
        """Patches by weight name, including those currently hidden from the host."""
        return self.patches if self._unfiltered_patches is None else self._unfiltered_patches

    def effective_patches(self, key: str) -> list:
        """Returns a weight's patches without those that its packed layer cannot apply."""
        patches = self.all_patches.get(key, [])
        weight = find_packed_weight(self, key)
        if weight is None or not runs_in_layer(self, key, patches):
            return patches
        return usable_patches(key, patches, weight.shape)

    @contextlib.contextmanager
    def _packed_patches_hidden(self) -> Iterator[None]:
        """Hides the patches of packed weights from the host inside the block."""
        if self._unfiltered_patches is not None:
            yield
            return
        packed = set(packed_keys(self))
        self._unfiltered_patches = self.patches
        self.patches = {key: patches for key, patches in self.patches.items() if key not in packed}
        try:
            yield
        finally:
            self.patches, self._unfiltered_patches = self._unfiltered_patches, None

    @contextlib.contextmanager
    def set_temporarily(self, **attributes: Any) -> Iterator[None]:
        """Sets attributes of this patcher inside the block, and to None after it."""
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(dict.fromkeys(attributes))

    # --- memory ---

    def full_size(self) -> int:
        """Returns the bytes of the weights on all devices."""
        return super().model_size()

    def model_size(self):
        limit = self._residency.limit(self)
        weights = self.full_size() if limit is None else limit  # the host frees no more than this
        return weights + factor_bytes(self)

    def memory_report(self, expected: bool = False) -> MemoryReport:
        """Returns where the weights are; `expected`: where they will be once the model has run."""
        return self._residency.memory_report(self, expected)

    def report_placement(self, expected: bool = False):
        """Calls `on_placement` with the memory report."""
        if self.on_placement is not None:
            self.on_placement(self, self.memory_report(expected))

    def _load_list(self, for_dynamic=False, default_device=None):
        if self.load_list_override is not None:
            return self.load_list_override
        entries = super()._load_list(for_dynamic, default_device)
        if not for_dynamic or self.placement is None:
            return entries
        entries = self._residency.sort_entries(self, entries)
        return [(rank, *entry[-4:]) for rank, entry in enumerate(entries)]

    def pin_weight_to_device(self, key):
        if self.deferred_pins is not None:
            self.deferred_pins.append(key)
        elif make_pinnable(self, key):
            weight = find_packed_weight(self, key)
            if weight is None:
                super().pin_weight_to_device(key)
            elif comfy.model_management.pin_memory(weight._qdata):
                self.pinned.add(key)

    def unpin_weight(self, key):
        weight = find_packed_weight(self, key)
        if weight is None:
            super().unpin_weight(key)
        elif key in self.pinned:
            comfy.model_management.unpin_memory(weight._qdata)
            self.pinned.remove(key)

    # --- loading ---

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        try:
            self._applied.check_source()
            prepare_kernels(self, device_to)  # for a dtype or a device that came since
        except BaseException:  # a cancel is no Exception
            super().detach()  # the host has forgotten it already
            raise
        if self.model.current_weight_patches_uuid != self.patches_uuid:
            self._forget_results()
        available_bytes = self.loaded_size() + extra_memory
        if self._residency.limit(self) is not None:
            excess = self.loaded_size() - self.model_size()
            if excess > 0:  # or the host would leave a fully loaded model as it is
                extra_memory = min(extra_memory, -excess)
        if not self.is_dynamic() and self._can_swap(device_to, force_patch_weights):
            before = self.loaded_size()
            with self.use_ejected(skip_and_inject_on_exit_only=True):
                try:
                    self._swap_patches(device_to)
                except Exception:
                    super().detach()
                    raise
            extra_memory -= self.loaded_size() - before  # the change in the factors' bytes
        self._applied.evicted = False
        loaded = super().partially_load(device_to, extra_memory,
                                        force_patch_weights=force_patch_weights)
        self._residency.available_bytes = available_bytes
        self.report_placement(expected=True)
        return loaded

    def _can_swap(self, device_to, force_patch_weights) -> bool:
        """Whether only patches differ from what is loaded, so that no weight needs to move.

        An object that is put in the place of a layer or weight, or of a part of the model, is not
        to get another one's patches.
        """
        objects = self.object_patches.keys() | self.object_patches_backup.keys()
        keys = self.all_patches.keys() | self._applied.layers.keys() | self.backup.keys()
        if any(f"{key}.".startswith(f"{name}.") for name in objects for key in keys):
            return False
        loaded = self.model.current_weight_patches_uuid
        force_cast = next((module.comfy_force_cast_weights for module in self.model.modules()
                           if hasattr(module, "comfy_force_cast_weights")), self.force_cast_weights)
        return (loaded is not None and loaded != self.patches_uuid and not force_patch_weights
                and self.model.device == device_to and force_cast == self.force_cast_weights)

    def _swap_patches(self, device_to):
        """Replaces the applied patches by this patcher's and leaves every weight on its device.

        The host's load that follows then has nothing to do.
        """
        self.unpatch_hooks()
        self.model.model_loaded_weight_memory -= self._applied.counted
        for key, backup in self.backup.items():
            device = comfy.utils.get_attr(self.model, key).device
            comfy.utils.set_attr_param(self.model, key, backup.weight.to(device))
        self.backup.clear()
        with self._packed_patches_hidden():
            for name, module in self.model.named_modules():
                self._swap_host_patches(name, module, device_to)
        self._applied.apply_all(self, device_to)
        self._log_float_layers()
        self.model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, 0, False, False)

    def _swap_host_patches(self, name: str, module, device_to):
        """Replaces the patches of one module that the host applies, as its own `load` does."""
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
                setattr(module, f"{param}_function",
                        functions + self.weight_wrapper_patches.get(key, []))

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False,
             full_load=False, **dynamic):
        if self.is_dynamic():
            self._load_dynamic(device_to, lowvram_model_memory, **dynamic)
        else:
            self._load_static(device_to, lowvram_model_memory, force_patch_weights, full_load)
        self._log_float_layers()
        if self.current_hooks is not None:  # the host applied them without the hidden patches
            self.patch_hooks(self.current_hooks)

    def _log_float_layers(self):
        """Logs once which layers' patches keep them from ComfyUI's own product."""
        text = float_layers_text(self)
        if text is not None and text != self._applied.logged:
            log.warning("%s", text)
        self._applied.logged = text

    def _load_static(self, device_to, budget: Any, force_patch_weights, full_load):
        limit = self._residency.limit(self) if device_to == self.load_device else None
        if limit is not None:
            available_bytes = float("inf") if full_load else budget - buffer_bytes(self)
            budget = min(limit + factor_bytes(self), available_bytes)
            full_load = False
            self.model.model_offload_buffer_memory = 0
        built = self._applied.reusable(self.patches_uuid, device_to)
        with self._packed_patches_hidden():
            if full_load:
                super().load(device_to, budget, force_patch_weights=force_patch_weights,
                             full_load=True)
                self.model.model_loaded_weight_memory = self.full_size()  # without the factors
            else:
                budget = max(1, budget - factor_bytes(self))
                self._load_in_part(device_to, budget, force_patch_weights)
        self._applied.apply_all(self, device_to, built)
        self._residency.fill_stores(self)

    def _load_in_part(self, device_to, budget, force_patch_weights):
        if device_to in (None, self.offload_device):
            super().load(device_to, budget, force_patch_weights=force_patch_weights)
        elif (not force_patch_weights and self._residency.is_in_order(self)
                and nothing_to_plan(self, device_to, budget)):
            hooks: Any = self.forced_hooks  # may be None
            self.apply_hooks(hooks, force_apply=True)
        else:
            planned = self._residency.planned(self, device_to, budget)
            with accounted(self, device_to), planned as resident_budget:
                super().load(device_to, resident_budget,  # pyright: ignore[reportArgumentType]
                             force_patch_weights=force_patch_weights)

    def _load_dynamic(self, device_to, lowvram_model_memory, dirty=False):
        # The host's `dirty` uploads every weight again. Only weights that the host patches itself,
        # and weights with a new slot, need that.
        self._residency.drop_slots_out_of_order(self, device_to)
        before = self._slots()
        built = self._applied.reusable(self.patches_uuid, device_to)
        resident_weights = self._residency.resident_weights(self, device_to)
        self._remove_patches()
        with self._packed_patches_hidden(), self.set_temporarily(resident_weights=resident_weights):
            super().load(device_to, lowvram_model_memory)
        for module, (slot, patched) in self._slots().items():
            old_slot, was_patched = before.get(module, (None, False))
            if slot is not old_slot or (dirty and (patched or was_patched)):
                module._v_signature = None
        self._applied.apply_all(self, device_to, built)
        self._residency.limit_pages(self)

    def _slots(self) -> dict[Any, tuple]:
        """Returns module -> (its memory in dynamic VRAM, whether the host patches its weights)."""
        slots = {}
        for module in self.model.modules():
            if hasattr(module, "_v"):
                is_patched = any(getattr(module, f"{param}_lowvram_function", None)
                                 for param in ("weight", "bias"))
                slots[module] = module._v, is_patched
        return slots

    # --- a run ---

    def prepare_state(self, timestep, model_options):
        """Prepares for a run of the model; the host calls it one or more times per step."""
        self._applied.check_source()
        self._residency.before_step(self, timestep)
        super().prepare_state(timestep, model_options)

    def cleanup(self):
        """Ends a run; the host calls it also when the run failed."""
        self._residency.after_run(self, failed=sys.exc_info()[0] is not None)
        super().cleanup()
        if self._applied.evicted:  # the host no longer knows the model as loaded
            self.detach()
        self.report_placement()

    # --- unloading ---

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._remove_patches()

    def _remove_patches(self):
        """Restores the weights that a load replaced, and frees the patches of packed layers."""
        if self.is_dynamic():
            super().restore_loaded_backups()
        self._applied.clear(self)

    def restore_loaded_backups(self):
        """Frees what a load put on the device in dynamic VRAM; returns the freed bytes.

        The host also calls it in the middle of a run, and would restore unpatched weights. Here
        weights keep their patches, so that the run continues with them.
        """
        patched = {key: (self.backup[key], comfy.utils.get_attr(self.model, key))
                   for key, patches in self.all_patches.items()
                   if key in self.backup and not runs_in_layer(self, key, patches)}
        restored = super().restore_loaded_backups()
        for key, (backup, weight) in patched.items():
            self.backup[key] = backup
            comfy.utils.set_attr_param(self.model, key, weight.to(self.offload_device))
        for key, (backup, weight) in (self.resident_weights or {}).items():
            self.backup[key] = backup
            comfy.utils.set_attr_param(self.model, key, weight)
        self._applied.offload(self)
        return restored

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        with (self._residency.unloading(self, memory_to_free) as nbytes,
              self._packed_patches_hidden()):
            return super().partially_unload(
                device_to, nbytes, force_patch_weights=force_patch_weights)

    def detach(self, unpatch_all=True):
        if unpatch_all and getattr(self.model, "current_patcher", None) is not None:
            return self._evict()
        return super().detach(unpatch_all)

    def _evict(self):
        """Moves a model off the device in the middle of a run, weights and patches alike.

        The host would remove the patches, and the rest of the run would continue without them.
        """
        self.partially_unload_ram(UNLOAD_ALL)
        self.partially_unload(self.offload_device, UNLOAD_ALL)
        self._applied.offload(self)
        self.model.model_loaded_weight_memory = 0
        self._applied.evicted = True
        return self.model

    # --- hooks: other patches for each part of the conditioning ---

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights,
                                    memory_counter):
        if find_packed_weight(self, key) is None:
            self._make_writable(key)
            return super().patch_hook_weight_to_device(hooks, combined_patches, key,
                                                       original_weights, memory_counter)
        patches = self.all_patches.get(key, []) + combined_patches[key]
        patches = build(self, key, patches, self.load_device, {key: original_weights.pop(key)})
        self._applied.replace_for_hooks(self, key, patches)
        if self.hook_mode == comfy.hooks.EnumHookMode.MaxSpeed:
            cached_patches: dict[str, Any] = self.cached_hook_patches.setdefault(hooks, {})
            cached_patches[key] = patches

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        if isinstance(cached_weights[key], (LayerPatches, type(None))):
            self._applied.replace_for_hooks(self, key, cached_weights[key])
        else:
            self._make_writable(key)
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def _make_writable(self, key: str):
        """Copies a dense weight out of the mapped file, for the host's hooks write into it."""
        if not self.is_dynamic() and key not in self.hook_backup:
            self.unpin_weight(key)
            comfy.utils.set_attr_param(self.model, key,
                                       comfy.utils.get_attr(self.model, key).clone())

    def _forget_results(self):
        """Has a network drop what it keeps of earlier runs, which had other patches: HiDream-O1 the
        keys and values of a prompt."""
        network = getattr(self.model, "diffusion_model", None)
        getattr(network, "clear_kv_cache", lambda: None)()

    def patch_hooks(self, hooks):
        self._forget_results()
        super().patch_hooks(hooks)

    def unpatch_hooks(self, whitelist_keys_set=None):
        self._applied.restore_after_hooks(self, whitelist_keys_set)
        super().unpatch_hooks(whitelist_keys_set)

    # --- patched weights ---

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False,
                               force_cast=False):
        patches = self.all_patches.get(key, [])
        weight = find_packed_weight(self, key)
        if weight is None or not runs_in_layer(self, key, patches):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight,
                                                  force_cast)
        if return_weight:
            patches = self.effective_patches(key)
            return patched_weights.patched_weight(key, patches, weight.to(device_to),
                                                  layer_of(self, key))
        if force_cast:
            if key not in self.backup:
                self.backup[key] = Backup(weight.to(self.offload_device), False)
            comfy.utils.set_attr_param(self.model, key, weight.to(device_to))
        elif patches and self._unfiltered_patches is None:  # another pack loads weight by weight
            self._applied.apply_one(self, key, device_to)
        return weight

    def get_key_patches(self, filter_prefix=None):
        """Returns name -> [weight, *patches], which other models merge with theirs."""
        weights = super().get_key_patches(filter_prefix)
        return {key: [weight, *(self.effective_patches(key) if patches else ())]
                for key, (weight, *patches) in weights.items()}

    def model_state_dict(self, filter_prefix=None):
        return patched_weights.patched_state_dict(self, super().model_state_dict(filter_prefix))

    def model_state_dict_for_saving(self, model=None, prefix=""):
        state_dict = super().model_state_dict_for_saving(model, prefix)
        return patched_weights.file_state_dict(self, state_dict, prefix)


@functools.cache
def _packed_class(cls: type) -> type[PackedPatcher]:
    return type(f"Packed{cls.__name__}", (PackedPatcher, cls), {})


def is_adoptable(patcher) -> bool:
    """Whether a patcher is the host's own or one of these.

    A class of another pack loads and patches weights in its own way.
    """
    return isinstance(patcher, PackedPatcher) or type(patcher).__module__ == "comfy.model_patcher"


def adopt(patcher: comfy.model_patcher.ModelPatcher) -> PackedPatcher:
    """Turns a patcher of the host, freshly loaded or cloned, into a `PackedPatcher` in place."""
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _packed_class(type(patcher))
    assert isinstance(patcher, PackedPatcher)
    model = patcher.model
    if not hasattr(model, "packed_patches"):
        model.packed_patches = AppliedPatches()
        model.packed_residency = Residency()
    return patcher
