"""Weights with their patches in them: one at a time, as a state dict, and for a file."""
import collections

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import LazyCastingParam

from ..patched_weights import PatchedWeights
from ..rounding import dithered
from ..tensor import is_packed
from .applying import ApplyingPatcher

Backup = collections.namedtuple("Dimension", ["weight", "inplace_update"])  # as the host keeps in `backup`


class SavingPatcher(ApplyingPatcher):
    """The methods of the host's patchers that give patched weights."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        patches = self._all_patches.get(key, [])
        weight = self._packed_weight(key)
        if weight is None or not self._owns(key, patches):
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        if return_weight:
            dense, patches = self._layer(key).dense_weight(weight.to(device_to), torch.float32), self.fitting_patches(key)
            if not patches:
                return dense.to(weight.dtype)
            return dithered(comfy.lora.calculate_weight(patches, dense, key), weight.dtype)
        if force_cast:
            if key not in self.backup:
                self.backup[key] = Backup(weight.to(self.offload_device), False)
            comfy.utils.set_attr_param(self.model, key, weight.to(device_to))
        elif patches and self._hidden is None:  # a loader that is not the host's asks weight by weight
            self._apply_one(key, device_to)
        return weight

    def get_key_patches(self, filter_prefix=None):
        """Weights and their patches, as other models take them to be merged with."""
        found = super().get_key_patches(filter_prefix)
        return {key: [weight, *(self.fitting_patches(key) if patches else ())] for key, (weight, *patches) in found.items()}

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
