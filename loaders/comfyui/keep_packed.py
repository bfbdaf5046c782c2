"""Keeps the weights of models and text encoders packed that the host has built from a file."""
import itertools

import comfy.model_patcher
import comfy.sd
import torch

from ...ops.layers import AUTOMATIC, FAST, fast_by_kitchen
from ...ops.layers.kernel_requests import prepare_kernels
from ...ops.layers.packed_layers import PackedLinear
from ...ops.log import log
from ...ops.patcher import adopt
from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import FileChangeGuard, WeightFile
from .compute import choose_compute
from .file_slices import stream_from_files
from .model_summary import log_load_summary


def wrap_model(patcher: comfy.model_patcher.ModelPatcher, file: WeightFile, compute: str):
    """Makes a diffusion model's patcher keep packed weights packed and logs the model's formats.

    Args:
        patcher: the host's; it is changed in place.
        file: the file that the weights were read from.
        compute: a key of `WHO_COMPUTES`; a warning is logged where FAST is not had.
    """
    log_load_summary(file, adopt(patcher))
    choose_compute(patcher, compute)
    if compute == AUTOMATIC:
        choose_kitchen_products(patcher)
    keep_packed(patcher)
    if compute == FAST:
        why = fast_by_kitchen.why_not_fast(patcher.load_device,
                                           patcher.model.get_dtype_inference())
        if why:
            log.warning("compute is fast, and the model computes as with exact: %s.", why)


def choose_kitchen_products(patcher: comfy.model_patcher.ModelPatcher):
    """Has comfy_kitchen multiply the weights whose makers meant it so, where it has the kernels."""
    dtype = patcher.model.get_dtype_inference()
    for layer in patcher.model.modules():
        if isinstance(layer, PackedLinear) and is_packed(layer.weight) and fast_by_kitchen.runs(
                layer.weight.params.format, patcher.load_device, dtype):
            layer.compute = FAST


class PackedCLIP(comfy.sd.CLIP):
    """The host's CLIP, always computing with the model of its patcher.

    The host's node that chooses a device gives a CLIP another patcher with another model. It loads
    that model and takes the LoRAs off the old one, but would go on computing with the old one.
    """

    @property
    def cond_stage_model(self):
        return self.patcher.model

    @cond_stage_model.setter
    def cond_stage_model(self, model):
        """Ignores the model: the host sets the patcher too, which has it."""

    def clone(self, *args, **kwargs):
        return _as_packed_clip(super().clone(*args, **kwargs))


def _as_packed_clip(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    clip.__dict__.pop("cond_stage_model", None)
    clip.__class__ = PackedCLIP
    return clip


def wrap_clip(clip: comfy.sd.CLIP):
    """Makes a text encoder's patcher keep packed weights packed, on every device."""
    keep_packed(clip.patcher)
    _as_packed_clip(clip)


def keep_packed(patcher: comfy.model_patcher.ModelPatcher, *dtypes: torch.dtype):
    """Makes a patcher of the host keep packed weights packed, and check that their file stays as
    it is whenever it loads.

    Args:
        patcher: is changed in place.
        dtypes: that the model may compute in, where it does not say so itself.
    """
    applied = adopt(patcher).model.packed_patches
    applied.check_source, applied.dtypes = guard_of(patcher.model), dtypes
    stream_from_files(patcher.model)
    prepare_kernels(patcher, makes_room=True)


def guard_of(model: torch.nn.Module) -> FileChangeGuard:
    """Returns a guard that raises once a file that holds a model's weights has changed."""
    return FileChangeGuard.of(itertools.chain(model.parameters(), model.buffers()))
