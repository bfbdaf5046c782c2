"""Lets the host merge models, and schedule their LoRAs, whose weights are in its own formats.

The host looks up each tensor that a model saves as an attribute of a layer, and a weight in its
formats is saved in parts that no layer has.
"""
import functools
from typing import Any

import comfy.model_patcher
import comfy.utils

from ...ops.tensor.packed_layout import is_comfy_quantized
from ..container.weight_file import WeightFileError


class _WholeWeights:
    """A mixin before the host's patcher."""

    def get_key_patches(self, filter_prefix=None):
        patcher: Any = self
        saved = patcher.model_state_dict
        patcher.model_state_dict = lambda *args: {
            name: tensor for name, tensor in saved(*args).items()
            if _has_attribute(patcher.model, name)}
        try:
            return super().get_key_patches(filter_prefix)  # pyright: ignore
        finally:
            del patcher.model_state_dict

    def patch_hooks(self, hooks):
        try:
            return super().patch_hooks(hooks)  # pyright: ignore
        except AssertionError as error:  # its layers quantise a weight in place only
            raise WeightFileError(
                "ComfyUI cannot schedule LoRAs or weights on layers in its own quantized formats."
                " Choose exact at `compute` of the loader."
            ) from error


def keep_weights_whole(patcher: comfy.model_patcher.ModelPatcher):
    """Changes a patcher of the host in place if weights of its model are in the host's formats."""
    if any(map(is_comfy_quantized, patcher.model.parameters())):
        patcher.__class__ = _with_whole_weights(type(patcher))


@functools.cache
def _with_whole_weights(patcher_class: type) -> type:
    return type(patcher_class.__name__, (_WholeWeights, patcher_class), {})


def _has_attribute(model, name: str) -> bool:
    try:
        comfy.utils.get_attr(model, name)
    except AttributeError:
        return False
    return True
