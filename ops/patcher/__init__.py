"""The mixin over the host's model patchers that keeps packed weights packed while patches are applied.

Packed here are also weights in the host's own quantised formats, where they lie in one of our layers: the host would
quantise them again with every patch.

`patches` stays what the host made it. Only applying differs: while the host loads, moves or unloads a model, the patches of
packed weights are out of its sight, and each packed layer gets them as `LayerPatches` on its attribute `lora`. What is
applied right now lives on the model, which all clones of a patcher share, never on a patcher.
"""
import functools

import comfy.model_patcher

from .applying import Applied
from .first_step import FirstStepPatcher
from .hooks import HooksPatcher
from .saving import SavingPatcher


class PackedPatcher(FirstStepPatcher, SavingPatcher, HooksPatcher):
    """The methods of `ModelPatcher` and `ModelPatcherDynamic` that would touch packed weights."""

    def clone(self, *args, **kwargs):
        clone = adopt(super().clone(*args, **kwargs))
        clone.size = self.size  # the host handed on model_size(), which counts this patcher's factors
        clone.placement, clone.tell = self.placement, self.tell
        return clone


@functools.cache
def _packed_class(cls: type) -> type:
    return type(f"Packed{cls.__name__}", (PackedPatcher, cls), {})


def is_adoptable(patcher) -> bool:
    """Whether a patcher is the host's own or one of these. A class of another pack loads and patches weights in its own way."""
    return isinstance(patcher, PackedPatcher) or type(patcher).__module__ == "comfy.model_patcher"


def adopt(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Make a patcher of the host, freshly loaded or cloned, keep packed weights packed. Returns it."""
    if not isinstance(patcher, PackedPatcher):
        patcher.__class__ = _packed_class(type(patcher))
    if not hasattr(patcher.model, "packed_patches"):
        patcher.model.packed_patches = Applied()
    return patcher
