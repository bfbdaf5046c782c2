"""What the host counts as loaded lies on the device, and nothing more: outside dynamic VRAM, where it loads models in part.

The host plans anew in each load which layers stay. Those that fall out of the plan it counts no more and leaves where they are;
those it must cast anyway, as most of a text encoder, it does not even look at again. They add up until the device is full. And
a byte less of free memory can give another plan, so that layers would travel in each prompt.
"""
import contextlib

import comfy.utils

from ..tensor import QuantizedTensor
from .pinning import PinningPatcher


class SettlingPatcher(PinningPatcher):
    """A patcher after whose loads the layers lie where the host has planned them."""

    _left_out = None  # in a load: names of the weights that the host plans to keep off the device, for whose sake it pins them

    @contextlib.contextmanager
    def _settled(self, device):
        """Around the host's load in part. device: the one it loads to."""
        for module in self._loaded_modules():  # or the host takes layers it must cast for some that are off the device already
            if hasattr(module, "prev_comfy_cast_weights"):
                module.comfy_cast_weights = module.prev_comfy_cast_weights
                del module.prev_comfy_cast_weights
        with self._pinning_later() as left_out:
            yield
        for name in dict.fromkeys(key.rpartition(".")[0] for key in left_out):
            self._move_out(name, self.model.get_submodule(name))
        self._put_away(left_out)
        self.model.model_loaded_weight_memory = self._bytes_on(device)

    @contextlib.contextmanager
    def _pinning_later(self):
        """Inside this block weights that the host would pin are only collected: in the list that it gives."""
        self._left_out = []
        try:
            yield self._left_out
        finally:
            self._left_out = None

    def _put_away(self, keys: list[str]):
        """Pin the weights that wait off the device."""
        for key in keys:
            self.pin_weight_to_device(key)

    def _keeps_its_place(self, device, budget: float) -> bool:
        """Whether what lies on the device may stay and nothing more fits, so that there is nothing to plan.

        budget: bytes of weights, and of the buffers that layers travel through. What is too much of a model leaves the device.
        """
        if self.model.current_weight_patches_uuid != self.patches_uuid or self.model.device != device:
            return False
        room = budget - self._bytes_on(device) - self.model.model_offload_buffer_memory
        waiting = [size for *_, size, _, module, _ in self._load_list()
                   if hasattr(module, "comfy_cast_weights") and not getattr(module, "comfy_patched_weights", False)]
        if not waiting or room >= min(waiting):
            return False
        if room < 0:
            self.partially_unload(self.offload_device, -room)
        self.model.model_loaded_weight_memory = self._bytes_on(device)
        return True

    def pin_weight_to_device(self, key):
        if self._left_out is None:
            super().pin_weight_to_device(key)
        else:
            self._left_out.append(key)

    def _loaded_modules(self) -> list:
        return [module for module in self.model.modules() if getattr(module, "comfy_patched_weights", False)]

    def _move_out(self, name: str, module):
        """Take a layer off the device, if it is there. The host has given it the patches for its unpatched weights already."""
        if not getattr(module, "comfy_patched_weights", False):
            return
        for param in module._parameters:
            backup = self.backup.pop(f"{name}.{param}", None)
            if backup is not None:
                comfy.utils.set_attr_param(self.model, f"{name}.{param}", backup.weight)
        module.to(self.offload_device)
        module.comfy_patched_weights = False

    def _bytes_on(self, device) -> int:
        """Bytes of a state dict's weights that lie on a device, as the host counts them, and of what wraps weights there."""
        nbytes = 0
        for module in self.model.modules():
            loaded = getattr(module, "comfy_patched_weights", False)
            saved = (value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set)
            nbytes += sum(_nbytes(value) for value in (*module._parameters.values(), *saved)
                          if value is not None and (loaded or value.device == device))
            functions = (*getattr(module, "weight_function", ()), *getattr(module, "bias_function", ()))
            nbytes += sum(function.move_to(device=device) for function in functions if hasattr(function, "move_to"))
        return nbytes


def _nbytes(value) -> int:
    parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]] if isinstance(value, QuantizedTensor) else [value]
    return sum(part.nbytes for part in parts)
