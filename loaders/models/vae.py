"""Loads VAEs as the host's own, keeps packed weights packed and 16-bit weights in 16 bits, and
makes a CPU faster at them.

A host that computes in float32 would keep every weight in float32. Its layers can cast at use.
"""
import contextlib
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.wan.vae import WanVAE
from comfy.ops import CastWeightBiasOp
from comfy.taesd.taesd import TAESD

from ...ops.layers.cpu_convolution import convolve_dense_layers
from ...ops.layers.kernel_requests import prepare_kernels
from ...ops.layers.load_hooks import dequantize_plain_parameters, pack_layers
from ...ops.layers.packed_layers import PackedLayer
from ...ops.patcher import adopt
from ...ops.tensor.packed_layout import is_packed
from ..comfyui.compute import EXACT, FLOAT32, vae_dtype
from ..comfyui.keep_packed import guard_of
from ..comfyui.weight_keys import unmerge_kernels
from ..container.weight_file import FileChangeGuard
from ..recipe import Recipe, register_loader
from .side_models import Kind, load_side_model

VAE = "VAE"  # kind of model, and name of the loader in recipes

HALF_DTYPES = (torch.float16, torch.bfloat16)
# VAEs that compute in the dtype of their input; others use the dtype of a weight.
DTYPE_AGNOSTIC_VAES = (AutoencodingEngine, TAESD, WanVAE)


class GuardedVAE(comfy.sd.VAE):
    """The host's VAE with weights in mapped files; `guard` raises once such a file has changed."""

    guard: FileChangeGuard

    def throw_exception_if_invalid(self):
        super().throw_exception_if_invalid()
        self.guard()  # the host calls this before it encodes or decodes


def wrap_vae(vae: Any, compute: str = EXACT) -> Any:
    """Guards the files that a VAE's weights are mapped from, downcasts the weights where that is
    exact, and makes it compute as fits a CPU; changes and returns `vae`.

    Args:
        vae: the host's.
        compute: a key of `compute.WHO_COMPUTES`.
    """
    model = vae.first_stage_model
    if model is None:
        return vae
    dtype = vae_dtype(model, vae.device, compute)
    if dtype is not None:
        vae.vae_dtype = dtype
        comfy.model_management.archive_model_dtypes(model.to(dtype))
    downcast_weights(vae)
    vae.size, vae.patcher.size = None, 0  # the host computes them again
    packed_layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    if packed_layers:
        adopt(vae.patcher).model.packed_patches.dtypes = (vae.vae_dtype,)
        prepare_kernels(vae.patcher, makes_room=True)
    if compute == FLOAT32:
        for layer in packed_layers:
            layer.compute = compute
    elif not packed_layers:  # which have their channels last by themselves
        convolve_dense_layers(model)
    guard = guard_of(model)
    if guard is not None and guard.files:
        vae.__class__ = GuardedVAE
        vae.guard = guard
    return vae


def downcast_weights(vae: comfy.sd.VAE):
    """Stores float32 weights of a loaded VAE in 16 bits if their values fit; it still computes in
    float32."""
    model = vae.first_stage_model
    if not isinstance(model, DTYPE_AGNOSTIC_VAES) or vae.patcher.is_dynamic():
        return
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            not isinstance(module, CastWeightBiasOp)
            or weight is None
            or weight.ndim < 2
            or weight.dtype != torch.float32
            or is_packed(weight)
        ):
            continue
        for dtype in HALF_DTYPES:
            half = weight.to(dtype)
            if torch.equal(half.float(), weight):
                module.weight = torch.nn.Parameter(half, requires_grad=False)
                module.comfy_cast_weights = True
                break


def load_vae(path: str, device: torch.device | None = None, compute: str = EXACT) -> comfy.sd.VAE:
    """Loads a VAE from a file or folder and keeps its packed weights packed.

    Args:
        path: of a file or folder.
        device: where the VAE runs; None: the host's choice.
        compute: a key of `compute.WHO_COMPUTES`.

    Raises:
        WeightFileError: if the file cannot be read or holds no known VAE.
    """
    def build(name, weights, metadata, operations) -> comfy.sd.VAE | None:
        vae = build_vae(weights, device, metadata)
        return None if vae.first_stage_model is None else vae

    vae = load_side_model(path, Kind(VAE, build))
    Recipe(VAE, (str(path),), {"device": device, "compute": compute}).attach(vae.patcher)
    return wrap_vae(vae, compute)


def build_vae(weights: Mapping[str, torch.Tensor], device: torch.device | None,
              metadata: Mapping | None = None) -> comfy.sd.VAE:
    """Builds the host's VAE for a device; on the CPU it stays there between runs too.

    Args:
        weights: of a file, packed ones and others.
        device: where the VAE runs; None: the host's choice.
        metadata: of the file.
    """
    weights = unmerge_kernels(dict(weights))
    is_any_packed = any(map(is_packed, weights.values()))
    with (pack_layers() if is_any_packed else contextlib.nullcontext(),
          dequantize_plain_parameters()):
        vae = comfy.sd.VAE(sd=weights, device=device, metadata=metadata)
    if device is not None and device.type == "cpu" and vae.first_stage_model is not None:
        vae.patcher.offload_device = device
    return vae


@register_loader(VAE)
def _patcher(path: str, disable_dynamic: bool = False,
             **options) -> comfy.model_patcher.ModelPatcher:
    """Loads the VAE for a recipe; the host has no `disable_dynamic` for VAEs."""
    return load_vae(path, **options).patcher
