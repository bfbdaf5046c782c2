"""Where a model's weights lie: how many stay on its device, which, and what keeps the others.

Which layers stay, `order` says. The first step of a model's first run is counted, and before the
next its layers are brought into the order that it asks for: between two steps no layer runs. A next
run then finds all in its place.

Outside dynamic VRAM the host still does the loading, of a list of layers that says what it is to
keep. In dynamic VRAM, pages of 32 MiB stay, from the first on, and layers get their places in them
in that order.
"""
import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch

from .applied_patches import factor_bytes
from .residency_order import (
    LayerProfile,
    ProfileRecorder,
    is_table,
    layer_entries,
    layers_that_fit,
    residency_order,
)
from .vram_accounting import bytes_on, move_out, offload_accounted

PAGE = 32 << 20  # bytes; what comfy-aimdo counts in
RESIDENT, GAP, COPIED = 0, -1, -2  # what the host's plan begins with comes first


@dataclass(frozen=True)
class Placement:
    """gpu_bytes: of weights and LoRAs that stay on the device that computes. stores: other devices,
    outside dynamic VRAM, each with the bytes of the rest that it takes at most, filled in turn.
    What then remains lies in the memory of the CPU.
    """

    gpu_bytes: int
    stores: tuple[tuple[torch.device, int], ...] = ()


class MemoryReport(NamedTuple):
    """Bytes of a model's weights: all of them, those on the device that computes, those in each
    store that has some, those that are copied to the device whenever they run, and how much that is
    in a step, in which layers run once, more often, or not.
    """
    size: int
    on_device: int
    stored: dict[torch.device, int]
    copied: int
    copied_per_step: int


class Residency:
    """Which layers of one model stay on its device. Without a `placement` the host decides it.

    step: what the first step of a run has shown, or None. room: bytes that the host had for the
    model at the last load, its budget aside. order: what the places of the layers followed from
    then. stored: whether layers lie in a store.
    """

    def __init__(self):
        self.profile = self.order = None
        self.room = float("inf")
        self.stored = False
        self._recorder = None  # in the first step: what counts it

    # --- which layers stay ---

    def in_order(self, patcher, entries: list) -> list:
        """Return entries of the host's list, those layers first that are to stay before others."""
        return residency_order(entries, patcher.placement.gpu_bytes, self.profile)

    def limit(self, patcher) -> int | None:
        """Return the bytes that may stay on the device outside dynamic VRAM; None: all of them."""
        is_offloaded = patcher.load_device != patcher.offload_device
        if patcher.placement is None or patcher.is_dynamic() or not is_offloaded:
            return None
        limit = max(0, patcher.placement.gpu_bytes - factor_bytes(patcher))
        return limit if limit < patcher.full_size() else None

    def is_in_order(self, patcher) -> bool:
        """Whether the layers lie as the last step that was counted, if any, and the budget say, or
        it does not matter."""
        if not patcher.is_dynamic():
            return self.limit(patcher) is None or self.order == self._order(patcher)
        if patcher.placement is None or patcher.placement.gpu_bytes >= patcher.full_size():
            return True
        return places_are_in_order(patcher)

    def _order(self, patcher) -> tuple:
        """What the order of the layers follows from."""
        return patcher.placement.gpu_bytes, self.profile

    @contextlib.contextmanager
    def planned(self, patcher, device, budget: float):
        """Inside this block the host keeps the right layers, with the budget that it yields."""
        if device != patcher.load_device or self.limit(patcher) is None:
            yield budget
            return
        entries = [layer_entries(entry) for entry in self.in_order(patcher, patcher._load_list())]
        listed = sum(entry.size for entry in entries if device_of(entry.module) == device)
        unlisted = bytes_on(patcher.model, device) - listed
        kept = layers_that_fit(entries, max(0, budget - unlisted))
        for name in [entry.name for entry in entries if entry.name not in kept]:
            move_out(patcher, name)  # before others come
        del entries  # which hold what lay there
        entries = [(RESIDENT if entry.name in kept else COPIED, *entry)
                   for entry in map(layer_entries, patcher._load_list())]
        # The host keeps a layer if those its streams may hold next fit too. In the gaps it sees
        # none.
        gaps = [(GAP, 0, str(number), torch.nn.Module(), {})
                for number in range(comfy.model_management.NUM_STREAMS)]
        with patcher.meanwhile(listed=[*entries, *gaps]):
            yield sum(size for rank, size, *_ in entries if rank == RESIDENT) + 0.5
        patcher.model.model_offload_buffer_memory = 0
        self.order = self._order(patcher)

    @contextlib.contextmanager
    def unloading(self, patcher, memory_to_free: float):
        """Have the host unload the right layers inside this block. Yields the bytes to ask it to
        free."""
        if self.limit(patcher) is None:
            yield memory_to_free
            return
        resident = [entry for entry in self.in_order(patcher, patcher._load_list())
                    if getattr(layer_entries(entry).module, "comfy_patched_weights", False)]
        resident_bytes = sum(layer_entries(entry).size for entry in resident)
        kept = layers_that_fit(resident, resident_bytes - memory_to_free)
        leaving = [entry for entry in resident if layer_entries(entry).name not in kept]
        unpinned = []
        with patcher.meanwhile(listed=leaving, unpinned=unpinned):
            yield 1e32
        patcher.model.model_offload_buffer_memory = 0
        self.room = min(self.room, patcher.loaded_size() + buffer_bytes(patcher))
        offload_accounted(patcher, unpinned)

    # --- the first step ---

    def before_step(self, patcher, timestep: torch.Tensor):
        """The host calls it before it runs a model, once or more in each step."""
        if self._recorder is not None and not torch.equal(timestep, self._recorder.timestep):
            self._end_counting()
            self.bring_into_order(patcher)
        if self._recorder is None and self._is_unknown(patcher):
            self._recorder = ProfileRecorder(patcher.model, timestep.clone())

    def after_run(self, patcher, failed: bool):
        if self._recorder is None:
            return
        self._end_counting()
        if failed:
            self.profile = None  # it was no whole step
        elif not patcher.is_dynamic():  # which would be empty then, and a load brings nothing
            self.bring_into_order(patcher)

    def _is_unknown(self, patcher) -> bool:
        """Whether a part of the model is copied, and no step has shown what runs."""
        return (patcher.placement is not None and self.profile is None
                and (patcher.is_dynamic() or patcher.model.model_lowvram)
                and patcher.memory_report().copied > 0)

    def _end_counting(self):
        self.profile, self._recorder = self._recorder.stop(), None

    def bring_into_order(self, patcher):
        """Between two steps. With hooks, whose weights the host keeps where it needs them, the next
        load does it."""
        has_hooks = patcher.current_hooks is not None or patcher.cached_hook_patches
        if self.is_in_order(patcher) or patcher.model.packed_patches.evicted or has_hooks:
            return
        with comfy.model_management.cuda_device_context(patcher.load_device):
            comfy.model_management.synchronize()  # the device may still read what is to move
            try:
                if patcher.is_dynamic():
                    patcher.load(patcher.load_device)
                else:
                    is_whole = self.room > patcher.model_size()
                    patcher.load(patcher.load_device, self.room, full_load=is_whole)
            except Exception:
                patcher.detach()
                raise
        patcher.report_placement(expected=True)

    # --- stores ---

    def fill_stores(self, patcher):
        """Move layers that are copied in whenever they run into the stores, the first ones first,
        and others out of them."""
        room = _stores(patcher)
        if not room and not self.stored:
            return
        self.stored = bool(room)
        not_waiting = patcher.load_device, torch.device("meta"), None
        waiting = [field for field in map(layer_entries, patcher._load_list())
                   if hasattr(field.module, "comfy_cast_weights")
                   and device_of(field.module) not in not_waiting]
        for field in waiting:
            device = device_of(field.module)
            if device in room and field.size <= room[device]:
                room[device] -= field.size
            elif device != patcher.offload_device:
                field.module.to(patcher.offload_device)
        devices = [*room, patcher.offload_device]
        for number, store in enumerate(room):
            left = min(room[store], comfy.model_management.get_free_memory(store))
            for field in waiting:
                device = device_of(field.module)
                if device not in devices[number + 1:] or field.size > left:
                    continue
                for param in field.module._parameters:
                    patcher.unpin_weight(f"{field.name}.{param}")
                field.module.to(store)
                left -= field.size
                if device in room:
                    room[device] += field.size

    # --- dynamic VRAM ---

    def weights_that_stay(self, patcher, device) -> dict:
        """Return weights on the device, unpatched, that the host would send there in each load."""
        staying = {}
        for key, backup in patcher.backup.items():
            module = patcher.model.get_submodule(key.rpartition(".")[0])
            weight = comfy.utils.get_attr(patcher.model, key)
            if hasattr(module, "comfy_cast_weights") or key in patcher.all_patches:
                continue
            if weight.device == device:
                staying[key] = backup, weight
        return staying

    def drop_places_out_of_order(self, patcher, device):
        """Layers that got their places in dynamic VRAM before there was a placement get new
        ones."""
        if patcher.placement is None or places_are_in_order(patcher):
            return
        for module in patcher.model.modules():
            for name in ("_v", "_v_weight", "_v_bias"):
                if hasattr(module, name):
                    delattr(module, name)
            module._v_signature = None
        del patcher.model.dynamic_vbars[device]

    def limit_pages(self, patcher):
        """The host has taken away the mark of an earlier load, up to which pages stay."""
        vbar = patcher._vbar_get()
        if patcher.placement is not None and vbar is not None:
            vbar.set_watermark(_pages(patcher) * PAGE)

    # --- what lies where ---

    def memory_report(self, patcher, expected: bool = False) -> MemoryReport:
        """As the model is loaded now. expected: as it will be when it has run once, for dynamic
        VRAM is filled only then."""
        on_device = bytes_on(patcher.model, patcher.load_device)
        stored = dict.fromkeys(_stores(patcher), 0)
        copied = per_step = coming = 0
        step = self.profile or LayerProfile()
        vbar = patcher._vbar_get() if patcher.is_dynamic() else None
        resident = [] if vbar is None else vbar.get_residency()
        if vbar is not None and expected and patcher.placement is not None:
            coming = min(_pages(patcher), patcher.get_free_memory(patcher.load_device) // PAGE)
        for field in map(layer_entries, patcher._load_list()):
            device = device_of(field.module)
            if vbar is not None and _has_its_pages(
                field.module, vbar.base_addr, resident, expected, coming
            ):
                on_device += field.size
            elif device != patcher.load_device and not is_table(field.module):
                copied += field.size
                per_step += field.size * step.runs(field.name)
            if device in stored:
                stored[device] += field.size
        stored = {device: size for device, size in stored.items() if size}
        return MemoryReport(patcher.full_size(), on_device, stored, copied, per_step)


def device_of(module) -> torch.device | None:
    return next((param.device for param in module._parameters.values() if param is not None), None)


def buffer_bytes(patcher) -> int:
    """Return the bytes that the host's streams copy layers into, at most."""
    sizes = (layer_entries(entry).size for entry in patcher._load_list())
    return comfy.model_management.NUM_STREAMS * max(sizes, default=0)


def places_are_in_order(patcher) -> bool:
    """Whether layers have their places in dynamic VRAM in the order in which they are to stay."""
    modules = (layer_entries(entry).module for entry in patcher._load_list(for_dynamic=True))
    places = [module._v[1] for module in modules if hasattr(module, "_v")]
    return places == sorted(places)


def _stores(patcher) -> dict[torch.device, int]:
    """Those of the placement, of which the devices that hold the model anyway are none."""
    stores = () if patcher.placement is None else patcher.placement.stores
    own = patcher.load_device, patcher.offload_device
    return {device: room for device, room in stores if device not in own}


def _pages(patcher) -> int:
    """How many pages of dynamic VRAM may stay, from the first on."""
    return max(0, patcher.placement.gpu_bytes - patcher.model.model_loaded_weight_memory) // PAGE


def _has_its_pages(module, base_addr: int, resident: list[int], expected: bool,
                   coming: int) -> bool:
    """Whether dynamic VRAM keeps a layer on the device, of which the model itself knows nothing;
    expected: or will.

    resident: of each page whether it is there. coming: how many are expected, from the first on.
    """
    if getattr(module, "_v", None) is None or not (expected or module._v_signature):
        return False
    _, start, size = module._v
    first, last = (start - base_addr) // PAGE, (start - base_addr + size - 1) // PAGE
    return last < coming or all(page & 1 for page in resident[first:last + 1])
