"""Keeps part of a model's weights on its device, and the rest in stores or in the CPU's memory.

`residency_order` chooses the layers that stay. The first step of a model's first run is profiled.
Before the second step, when no layer runs, the layers are moved as the profile asks, so later runs
find them in place.

Outside dynamic VRAM the host does the loading, from a list of layers that tells it which to keep.
In dynamic VRAM the first pages of 32 MiB stay, and layers get their slots in them in that order.
"""
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch

from .applied_patches import factor_bytes
from .residency_order import (
    LayerProfile,
    ProfileRecorder,
    is_table,
    layer_entry,
    layers_that_fit,
    residency_order,
)
from .vram_accounting import bytes_on, move_out, offload_accounted

PAGE = 32 << 20  # bytes of a page of comfy-aimdo
RESIDENT, GAP, COPIED = 0, -1, -2  # ranks in the load list; the host takes the highest first
UNLOAD_ALL = int(1e32)  # bytes to free; what the host asks for to free everything


@dataclass(frozen=True)
class Placement:
    """Where a model's weights should be; what fits nowhere else stays in the CPU's memory.

    Attributes:
        gpu_bytes: Bytes of weights and LoRAs to keep on the device that computes.
        stores: Other devices with the most bytes each may take, filled in this order. Not used in
            dynamic VRAM.
    """

    gpu_bytes: int
    stores: tuple[tuple[torch.device, int], ...] = ()


class MemoryReport(NamedTuple):
    """Bytes of a model's weights by where they are.

    Attributes:
        size: All weights.
        on_device: Weights on the device that computes.
        stored: Weights in each store that has any.
        copied: Weights that are copied to the device whenever their layer runs.
        copied_per_step: Bytes copied in a step, where a layer may run several times or never.
    """

    size: int
    on_device: int
    stored: dict[torch.device, int]
    copied: int
    copied_per_step: int


class Residency:
    """Decides which layers of one model stay on its device; without a `placement` the host does.

    Attributes:
        profile: The profile of a run's first step, or None before there is one.
        available_bytes: Bytes that the host had for the model at the last load.
        order: The budget and the profile that the layers were last arranged by.
        uses_stores: Whether layers may be in a store.
    """

    def __init__(self):
        self.profile: LayerProfile | None = None
        self.available_bytes = float("inf")
        self.order: tuple | None = None
        self.uses_stores = False
        self._recorder: ProfileRecorder | None = None  # during the first step

    # --- which layers stay ---

    def sort_entries(self, patcher, entries: list) -> list:
        """Sorts entries of the host's load list, the layers that should stay first."""
        return residency_order(entries, patcher.placement.gpu_bytes, self.profile)

    def limit(self, patcher) -> int | None:
        """Returns the bytes that may stay on the device; None: all, or dynamic VRAM decides."""
        is_offloaded = patcher.load_device != patcher.offload_device
        if patcher.placement is None or patcher.is_dynamic() or not is_offloaded:
            return None
        limit = max(0, patcher.placement.gpu_bytes - factor_bytes(patcher))
        return limit if limit < patcher.full_size() else None

    def is_in_order(self, patcher) -> bool:
        """Whether the layers are where budget and profile ask for, or all fit on the device."""
        if not patcher.is_dynamic():
            return self.limit(patcher) is None or self.order == self._order(patcher)
        if patcher.placement is None or patcher.placement.gpu_bytes >= patcher.full_size():
            return True
        return slots_are_in_order(patcher)

    def _order(self, patcher) -> tuple:
        return patcher.placement.gpu_bytes, self.profile

    @contextlib.contextmanager
    def planned(self, patcher, device, budget: float) -> Iterator[float]:
        """Makes the host keep the right layers inside the block, with the budget it yields."""
        if device != patcher.load_device or self.limit(patcher) is None:
            yield budget
            return
        entries = list(map(layer_entry, self.sort_entries(patcher, patcher._load_list())))
        listed = sum(entry.size for entry in entries if device_of(entry.module) == device)
        unlisted = bytes_on(patcher.model, device) - listed
        kept = layers_that_fit(entries, max(0, budget - unlisted))
        leaving = [entry.name for entry in entries if entry.name not in kept]
        del entries  # which reference the weights that are to be freed
        for name in leaving:
            move_out(patcher, name)  # before other layers come
        entries = list(map(layer_entry, patcher._load_list()))
        ranked = [(RESIDENT if entry.name in kept else COPIED, *entry) for entry in entries]
        # The host keeps a layer only if the next ones, which its streams may hold, fit as well. So
        # entries without bytes follow the last layer to keep.
        gaps = [(GAP, 0, str(number), torch.nn.Module(), {})
                for number in range(comfy.model_management.NUM_STREAMS)]
        with patcher.set_temporarily(load_list_override=[*ranked, *gaps]):
            yield sum(entry.size for entry in entries if entry.name in kept) + 0.5
        patcher.model.model_offload_buffer_memory = 0
        self.order = self._order(patcher)

    @contextlib.contextmanager
    def unloading(self, patcher, memory_to_free: int) -> Iterator[int]:
        """Makes the host unload the right layers inside the block; yields the bytes to free."""
        if self.limit(patcher) is None:
            yield memory_to_free
            return
        resident = [entry for entry in self.sort_entries(patcher, patcher._load_list())
                    if getattr(layer_entry(entry).module, "comfy_patched_weights", False)]
        resident_bytes = sum(layer_entry(entry).size for entry in resident)
        kept = layers_that_fit(resident, resident_bytes - memory_to_free)
        leaving = [entry for entry in resident if layer_entry(entry).name not in kept]
        deferred_pins = []
        with patcher.set_temporarily(load_list_override=leaving, deferred_pins=deferred_pins):
            yield UNLOAD_ALL
        patcher.model.model_offload_buffer_memory = 0
        self.available_bytes = min(self.available_bytes,
                                   patcher.loaded_size() + buffer_bytes(patcher))
        offload_accounted(patcher, deferred_pins)

    # --- the first step ---

    def before_step(self, patcher, timestep: torch.Tensor):
        """Profiles a run's first step, and arranges the layers before its second.

        The host calls it before it runs the model, one or more times per step.
        """
        if self._recorder is not None and not torch.equal(timestep, self._recorder.timestep):
            self._end_profiling(self._recorder)
            self.arrange_layers(patcher)
        if self._recorder is None and self._needs_profile(patcher):
            self._recorder = ProfileRecorder(patcher.model, timestep.clone())

    def after_run(self, patcher, failed: bool):
        """Arranges the layers after a run of a single step; a failed run has no profile."""
        if self._recorder is None:
            return
        self._end_profiling(self._recorder)
        if failed:
            self.profile = None  # the step was not completed
        elif not patcher.is_dynamic():  # dynamic VRAM would only be emptied by a load
            self.arrange_layers(patcher)

    def _needs_profile(self, patcher) -> bool:
        """Whether a part of the model is copied and no step was profiled."""
        return (patcher.placement is not None and self.profile is None
                and (patcher.is_dynamic() or patcher.model.model_lowvram)
                and patcher.memory_report().copied > 0)

    def _end_profiling(self, recorder: ProfileRecorder):
        self.profile = recorder.stop()
        self._recorder = None

    def arrange_layers(self, patcher):
        """Moves layers as budget and profile ask for, between two steps.

        With hooks, whose weights the host places itself, the next load does it.
        """
        has_hooks = patcher.current_hooks is not None or patcher.cached_hook_patches
        if self.is_in_order(patcher) or patcher.model.packed_patches.evicted or has_hooks:
            return
        with comfy.model_management.cuda_device_context(patcher.load_device):
            comfy.model_management.synchronize()  # the device may still read what is to move
            try:
                if patcher.is_dynamic():
                    patcher.load(patcher.load_device)
                else:
                    fits = self.available_bytes > patcher.model_size()
                    patcher.load(patcher.load_device, self.available_bytes, full_load=fits)
            except Exception:
                patcher.detach()
                raise
        patcher.report_placement(expected=True)

    # --- stores ---

    def fill_stores(self, patcher):
        """Moves layers that are copied at each run into the stores, and others out of them."""
        capacity = _stores(patcher)
        if not capacity and not self.uses_stores:
            return
        self.uses_stores = bool(capacity)
        excluded = patcher.load_device, torch.device("meta"), None
        offloaded = [entry for entry in map(layer_entry, patcher._load_list())
                     if hasattr(entry.module, "comfy_cast_weights")
                     and device_of(entry.module) not in excluded]
        for entry in offloaded:
            device = device_of(entry.module)
            if device in capacity and entry.size <= capacity[device]:
                capacity[device] -= entry.size
            elif device != patcher.offload_device:
                entry.module.to(patcher.offload_device)
        devices = [*capacity, patcher.offload_device]
        for number, store in enumerate(capacity):
            free: Any = comfy.model_management.get_free_memory(store)
            free = min(capacity[store], free)
            for entry in offloaded:
                device = device_of(entry.module)
                if device not in devices[number + 1:] or entry.size > free:
                    continue
                for param in entry.module._parameters:
                    patcher.unpin_weight(f"{entry.name}.{param}")
                entry.module.to(store)
                free -= entry.size
                if device in capacity:
                    capacity[device] += entry.size

    # --- dynamic VRAM ---

    def resident_weights(self, patcher, device) -> dict[str, tuple]:
        """Returns unpatched weights on the device that the host would copy there in each load.

        Returns:
            Weight name -> (the host's backup of the weight, the weight on the device).
        """
        resident = {}
        for key, backup in patcher.backup.items():
            module = patcher.model.get_submodule(key.rpartition(".")[0])
            weight = comfy.utils.get_attr(patcher.model, key)
            if hasattr(module, "comfy_cast_weights") or key in patcher.all_patches:
                continue
            if weight.device == device:
                resident[key] = backup, weight
        return resident

    def drop_slots_out_of_order(self, patcher, device):
        """Drops slots in dynamic VRAM given before there was a placement; a load gives new ones."""
        if patcher.placement is None or slots_are_in_order(patcher):
            return
        for module in patcher.model.modules():
            for name in ("_v", "_v_weight", "_v_bias"):
                if hasattr(module, name):
                    delattr(module, name)
            module._v_signature = None
        del patcher.model.dynamic_vbars[device]

    def limit_pages(self, patcher):
        """Sets how many pages of dynamic VRAM stay; the host resets that in each load."""
        vbar = patcher._vbar_get()
        if patcher.placement is not None and vbar is not None:
            vbar.set_watermark(_pages(patcher) * PAGE)

    # --- the report ---

    def memory_report(self, patcher, expected: bool = False) -> MemoryReport:
        """Returns where the weights are.

        Args:
            patcher: The patcher of the model.
            expected: Whether to count what a run will load, which is when dynamic VRAM fills.
        """
        on_device = bytes_on(patcher.model, patcher.load_device)
        stored = dict.fromkeys(_stores(patcher), 0)
        copied = copied_per_step = expected_pages = 0
        profile = self.profile or LayerProfile()
        vbar = patcher._vbar_get() if patcher.is_dynamic() else None
        resident = [] if vbar is None else vbar.get_residency()
        if vbar is not None and expected and patcher.placement is not None:
            free_pages = patcher.get_free_memory(patcher.load_device) // PAGE
            expected_pages = min(_pages(patcher), free_pages)
        for entry in map(layer_entry, patcher._load_list()):
            device = device_of(entry.module)
            if vbar is not None and _is_in_pages(entry.module, vbar.base_addr, resident, expected,
                                                 expected_pages):
                on_device += entry.size
            elif device != patcher.load_device and not is_table(entry.module):
                copied += entry.size
                copied_per_step += entry.size * profile.runs(entry.name)
            if device in stored:
                stored[device] += entry.size
        stored = {device: size for device, size in stored.items() if size}
        return MemoryReport(patcher.full_size(), on_device, stored, copied, copied_per_step)


def device_of(module: torch.nn.Module) -> torch.device | None:
    """Returns the device of a module's own parameters, or None if it has none."""
    return next((param.device for param in module._parameters.values() if param is not None), None)


def buffer_bytes(patcher) -> int:
    """Returns the most bytes that the buffers of the host's streams take."""
    sizes = (layer_entry(entry).size for entry in patcher._load_list())
    return comfy.model_management.NUM_STREAMS * max(sizes, default=0)


def slots_are_in_order(patcher) -> bool:
    """Whether the layers' slots in dynamic VRAM are in the order of `residency_order`."""
    modules: list[Any] = [layer_entry(entry).module
                          for entry in patcher._load_list(for_dynamic=True)]
    addresses = [module._v[1] for module in modules if hasattr(module, "_v")]
    return addresses == sorted(addresses)


def _stores(patcher) -> dict[torch.device, int]:
    """Returns store -> its bytes, without the devices that the model uses itself."""
    stores = () if patcher.placement is None else patcher.placement.stores
    own = patcher.load_device, patcher.offload_device
    return {device: nbytes for device, nbytes in stores if device not in own}


def _pages(patcher) -> int:
    """Returns how many of the first pages of dynamic VRAM may stay."""
    return max(0, patcher.placement.gpu_bytes - patcher.model.model_loaded_weight_memory) // PAGE


def _is_in_pages(module: Any, base_addr: int, resident: list[int], expected: bool,
                 expected_pages: int) -> bool:
    """Whether dynamic VRAM has a layer on the device, or will have after a run.

    Args:
        module: The layer; it does not show this itself.
        base_addr: Address of the first page.
        resident: One number per page; its lowest bit tells whether the page is on the device.
        expected: Whether to count the pages that a run will load.
        expected_pages: How many of the first pages a run will load.
    """
    if getattr(module, "_v", None) is None or not (expected or module._v_signature):
        return False
    _, start, size = module._v
    first, last = (start - base_addr) // PAGE, (start - base_addr + size - 1) // PAGE
    return last < expected_pages or all(page & 1 for page in resident[first:last + 1])
