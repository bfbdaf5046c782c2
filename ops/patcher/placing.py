"""Where a model's weights lie: how many stay on its device, which, and what keeps the others.

Which layers stay, `order` says.

Outside dynamic VRAM the host still does the loading, of a list of layers that says what it is to keep. In dynamic VRAM, pages
of 32 MiB stay, from the first on, and layers get their places in them in that order.
"""
import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_management
import torch

from .counting import Step
from .loading import LoadingPatcher
from .order import fields, fitting, in_order, is_table

PAGE = 32 << 20  # bytes; what comfy-aimdo counts in
KEPT, GAP, COPIED = 0, -1, -2  # what the host's plan begins with comes first


@dataclass(frozen=True)
class Placement:
    """gpu_bytes: of weights and LoRAs that stay on the device that computes. stores: other devices, outside dynamic VRAM, each
    with the bytes of the rest that it takes at most, filled in turn. What then remains lies in the memory of the CPU.
    """

    gpu_bytes: int
    stores: tuple[tuple[torch.device, int], ...] = ()


class Whereabouts(NamedTuple):
    """Bytes of a model's weights: all of them, those on the device that computes, those in each store that has some, those that
    are copied to the device whenever they run, and how much that is in a step, in which layers run once, more often, or not.
    """
    size: int
    here: int
    stored: dict[torch.device, int]
    copied: int
    copied_per_step: int


class PlacingPatcher(LoadingPatcher):
    """The methods of the host's patchers that decide what lies where. Without a `placement` that is left to the host."""

    placement: Placement | None = None
    tell = None  # a function that is called with the patcher and its `Whereabouts` after each load and at the end of each run
    _listed = None  # while the host loads or unloads: what it finds in the list of its layers

    # --- which layers stay ---

    def _load_list(self, for_dynamic=False, default_device=None):
        if self._listed is not None:
            return self._listed
        entries = super()._load_list(for_dynamic, default_device)
        if not for_dynamic or self.placement is None:
            return entries
        return [(rank, *entry[-4:]) for rank, entry in enumerate(self._in_order(entries))]

    def _in_order(self, entries: list) -> list:
        return in_order(entries, self.placement.gpu_bytes, self.model.packed_patches.step)

    @contextlib.contextmanager
    def _listing(self, entries: list):
        self._listed = entries
        try:
            yield
        finally:
            self._listed = None

    def _order(self) -> tuple:
        """What the order of the layers follows from."""
        return self.placement.gpu_bytes, self.model.packed_patches.step

    def _is_in_order(self) -> bool:
        """Whether the layers lie as the last step that was counted, if any, and the budget say, or it does not matter."""
        if self.is_dynamic():
            return self.placement is None or self.placement.gpu_bytes >= self.full_size() or self._places_are_in_order()
        return self._limit() is None or self.model.packed_patches.order == self._order()

    def full_size(self) -> int:
        """Bytes of the weights, wherever they lie."""
        return super().model_size() - self._factor_bytes()

    def _limit(self) -> int | None:
        """Bytes of weights that may stay on the device outside dynamic VRAM, where that is not all of them."""
        if self.placement is None or self.is_dynamic() or self.load_device == self.offload_device:
            return None
        limit = max(0, self.placement.gpu_bytes - self._factor_bytes())
        return limit if limit < self.full_size() else None

    def model_size(self):
        limit = self._limit()
        return super().model_size() if limit is None else limit + self._factor_bytes()  # so that nobody makes room for more

    # --- loading ---

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        room = self.loaded_size() + extra_memory
        if self._limit() is not None:
            too_much = self.loaded_size() - self.model_size()
            if too_much > 0:  # or the host leaves a model that is loaded wholly as it is
                extra_memory = min(extra_memory, -too_much)
        loaded = super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)
        self.model.packed_patches.room = room
        if self.tell is not None:
            self.tell(self, self.whereabouts(expected=True))
        return loaded

    def cleanup(self):
        super().cleanup()
        if self.tell is not None:
            self.tell(self, self.whereabouts())

    def _load_static(self, device_to, budget, force_patch_weights, full_load):
        limit = self._limit()
        if limit is not None and device_to == self.load_device:
            room = float("inf") if full_load else budget - self._buffers()
            budget, full_load = min(limit + self._factor_bytes(), room), False
            self.model.model_offload_buffer_memory = 0
        super()._load_static(device_to, budget, force_patch_weights, full_load)
        self._fill_stores()

    def _plan(self, device_to, budget, force_patch_weights):
        if self._limit() is None or device_to != self.load_device:
            return super()._plan(device_to, budget, force_patch_weights)
        entries = [fields(entry) for entry in self._in_order(self._load_list())]
        unlisted = self._bytes_on(device_to) - sum(entry.size for entry in entries if _lies_on(entry.module) == device_to)
        kept = fitting(entries, max(0, budget - unlisted))
        for name in [entry.name for entry in entries if entry.name not in kept]:
            self._move_out(name, self.model.get_submodule(name))  # before others come
        del entries  # which hold what lay there
        listed = [(KEPT if entry.name in kept else COPIED, *entry) for entry in map(fields, self._load_list())]
        # The host keeps a layer if those its streams may hold next fit too. In the gaps it sees none.
        gaps = [(GAP, 0, str(number), torch.nn.Module(), {}) for number in range(comfy.model_management.NUM_STREAMS)]
        with self._listing([*listed, *gaps]):
            super()._plan(device_to, sum(size for rank, size, *_ in listed if rank == KEPT) + 0.5, force_patch_weights)
        self.model.model_offload_buffer_memory = 0
        self.model.packed_patches.order = self._order()

    def _keeps_its_place(self, device, budget):
        return self._is_in_order() and super()._keeps_its_place(device, budget)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        if self._limit() is None:
            return super().partially_unload(device_to, memory_to_free, force_patch_weights=force_patch_weights)
        here = [entry for entry in self._in_order(self._load_list())
                if getattr(fields(entry).module, "comfy_patched_weights", False)]
        kept = fitting(here, sum(fields(entry).size for entry in here) - memory_to_free)
        with self._pinning_later() as left_out:
            with self._listing([entry for entry in here if fields(entry).name not in kept]):
                freed = super().partially_unload(device_to, 1e32, force_patch_weights=force_patch_weights)
        self.model.model_offload_buffer_memory = 0
        self.model.packed_patches.room = min(self.model.packed_patches.room, self.loaded_size() + self._buffers())
        self._put_away(left_out)
        return freed

    def _buffers(self) -> int:
        """Bytes that the host's streams copy layers into, at most."""
        sizes = (fields(entry).size for entry in self._load_list())
        return comfy.model_management.NUM_STREAMS * max(sizes, default=0)

    # --- stores ---

    def _stores(self) -> dict[torch.device, int]:
        """Those of the placement, of which the devices that hold the model anyway are none."""
        stores = () if self.placement is None else self.placement.stores
        return {device: room for device, room in stores if device not in (self.load_device, self.offload_device)}

    def _put_away(self, keys):
        self._fill_stores()
        super()._put_away(keys)

    def _fill_stores(self):
        """Move layers that are copied in whenever they run into the stores, the first ones first, and others out of them."""
        room = self._stores()
        if not room and not self.model.packed_patches.stored:
            return
        self.model.packed_patches.stored = bool(room)
        waiting = [field for field in map(fields, self._load_list()) if hasattr(field.module, "comfy_cast_weights")
                   and _lies_on(field.module) not in (self.load_device, torch.device("meta"), None)]
        for field in waiting:
            device = _lies_on(field.module)
            if device in room and field.size <= room[device]:
                room[device] -= field.size
            elif device != self.offload_device:
                field.module.to(self.offload_device)
        devices = [*room, self.offload_device]
        for number, store in enumerate(room):
            left = min(room[store], comfy.model_management.get_free_memory(store))
            for field in waiting:
                device = _lies_on(field.module)
                if device not in devices[number + 1:] or field.size > left:
                    continue
                for param in field.module._parameters:
                    self.unpin_weight(f"{field.name}.{param}")
                field.module.to(store)
                left -= field.size
                if device in room:
                    room[device] += field.size

    # --- dynamic VRAM ---

    def _load_dynamic(self, device_to, lowvram_model_memory, dirty=False):
        if self.placement is not None:
            self._drop_places_out_of_order(device_to)
        super()._load_dynamic(device_to, lowvram_model_memory, dirty=dirty)
        vbar = self._vbar_get()
        if self.placement is not None and vbar is not None:  # the host has taken away the mark of an earlier load
            vbar.set_watermark(self._pages() * PAGE)

    def _pages(self) -> int:
        """How many pages of dynamic VRAM may stay, from the first on."""
        return max(0, self.placement.gpu_bytes - self.model.model_loaded_weight_memory) // PAGE

    def _drop_places_out_of_order(self, device):
        """Layers that got their places in dynamic VRAM before there was a placement get new ones."""
        if self._places_are_in_order():
            return
        for module in self.model.modules():
            for name in ("_v", "_v_weight", "_v_bias"):
                if hasattr(module, name):
                    delattr(module, name)
            module._v_signature = None
        del self.model.dynamic_vbars[device]

    def _places_are_in_order(self) -> bool:
        modules = (fields(entry).module for entry in self._load_list(for_dynamic=True))
        places = [module._v[1] for module in modules if hasattr(module, "_v")]
        return places == sorted(places)

    # --- what lies where ---

    def whereabouts(self, expected: bool = False) -> Whereabouts:
        """As the model is loaded now. expected: as it will be when it has run once, for dynamic VRAM is filled only then."""
        here, stored, copied, per_step = self._bytes_on(self.load_device), dict.fromkeys(self._stores(), 0), 0, 0
        step = self.model.packed_patches.step or Step()
        vbar = self._vbar_get() if self.is_dynamic() else None
        resident = [] if vbar is None else vbar.get_residency()
        coming = 0
        if vbar is not None and expected and self.placement is not None:
            coming = min(self._pages(), self.get_free_memory(self.load_device) // PAGE)
        for field in map(fields, self._load_list()):
            if vbar is not None and _has_its_pages(field.module, vbar.base_addr, resident, expected, coming):
                here += field.size
            elif _lies_on(field.module) != self.load_device and not is_table(field.module):
                copied += field.size
                per_step += field.size * step.times(field.name)
            if _lies_on(field.module) in stored:
                stored[_lies_on(field.module)] += field.size
        stored = {device: size for device, size in stored.items() if size}
        return Whereabouts(self.full_size(), here, stored, copied, per_step)


def _has_its_pages(module, base_addr: int, resident: list[int], expected: bool, coming: int) -> bool:
    """Whether dynamic VRAM keeps a layer on the device, of which the model itself knows nothing; expected: or will.

    resident: of each page whether it is there. coming: how many are expected, from the first on.
    """
    if getattr(module, "_v", None) is None or not (expected or module._v_signature):
        return False
    _, start, size = module._v
    first, last = (start - base_addr) // PAGE, (start - base_addr + size - 1) // PAGE
    return last < coming or all(page & 1 for page in resident[first:last + 1])


def _lies_on(module) -> torch.device | None:
    return next((param.device for param in module._parameters.values() if param is not None), None)
