"""Pinned memory for the weights that stay off the device, from where copies run while layers compute."""
import comfy.model_management
import comfy.utils
import torch

from ..read_only import is_read_only
from .applying import ApplyingPatcher

KEPT_FREE = 4  # one part in so many of the memory of the machine is not filled with copies


class PinningPatcher(ApplyingPatcher):
    """The methods of the host's patchers that pin weights, outside dynamic VRAM.

    A driver pins no memory that may not be written, such as a mapped file. A weight that is still there is copied first, as it
    is by a way to the device and back; where there is not enough memory, it stays in the file and is not pinned.
    """

    def pin_weight_to_device(self, key):
        weight = self._packed_weight(key)
        data = comfy.utils.get_attr(self.model, key) if weight is None else weight._qdata
        if is_read_only(data):
            if not _room_for(data.nbytes):
                return
            if weight is None:
                comfy.utils.set_attr_param(self.model, key, data.clone())
            else:
                weight._qdata = data.clone()
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


def _room_for(nbytes: int) -> bool:
    """Whether the host pins at all, and so many bytes more, and the memory of the machine has room for a copy of them."""
    if comfy.model_management.TOTAL_PINNED_MEMORY + nbytes > comfy.model_management.MAX_PINNED_MEMORY:
        return False
    cpu = torch.device("cpu")
    free, total = comfy.model_management.get_free_memory(cpu), comfy.model_management.get_total_memory(cpu)
    return free - nbytes > total / KEPT_FREE
