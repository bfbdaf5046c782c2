"""VAEs: the host's own, with 16-bit weights held as the file has them.

Where the host computes in float32 it holds every weight so. Its layers cast at use when told to.
"""
import os
from collections.abc import Mapping

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.wan.vae import WanVAE
from comfy.ops import CastWeightBiasOp
from comfy.taesd.taesd import TAESD

from ..ops.packed_layout import is_packed
from .comfy_bridge import guard_of
from .comfy_quant import reject_unread_layers
from .files import open_weights
from .files.container import WeightFileError
from .reader_choice import needs_own_reader
from .recipe import Recipe, register_loader

VAE = "VAE"

NARROW = (torch.float16, torch.bfloat16)
# Those known to take the dtype of what they compute from their input; others read it from a weight.
DTYPE_AGNOSTIC_VAES = (AutoencodingEngine, TAESD, WanVAE)


class WatchedVAE(comfy.sd.VAE):
    """The host's VAE, some of whose weights lie in mapped files. guard: raises where one of these
    is written to."""

    def throw_exception_if_invalid(self):
        super().throw_exception_if_invalid()
        self.guard()  # the host calls this before it encodes or decodes


def wrap_vae(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    """Return a VAE that the host has built of a file's weights, narrowed, and watched where they
    lie in the file."""
    vae = downcast_weights(vae)
    guard = guard_of(vae.first_stage_model) if vae.first_stage_model is not None else None
    if guard is not None and guard.files:
        vae.__class__, vae.guard = WatchedVAE, guard
    return vae


def downcast_weights(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    """Hold in 16 bits each float32 weight of a loaded VAE whose values have no more; it computes
    what it did. Returns `vae`."""
    model = vae.first_stage_model
    if not isinstance(model, DTYPE_AGNOSTIC_VAES) or vae.patcher.is_dynamic():
        return vae
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            not isinstance(module, CastWeightBiasOp)
            or weight is None
            or weight.ndim < 2
            or weight.dtype != torch.float32
        ):
            continue
        narrow = next(
            filter(lambda narrow: torch.equal(narrow.float(), weight), map(weight.to, NARROW)),
            None)
        if narrow is not None:
            module.weight = torch.nn.Parameter(narrow, requires_grad=False)
            module.comfy_cast_weights = True
    vae.size, vae.patcher.size = None, 0  # the host counts anew
    return vae


def load_vae(path: str, device: torch.device | None = None) -> comfy.sd.VAE:
    """Load a VAE from a file or a folder; of packed weights the values. device: where it runs;
    None: where the host has it.

    Raises WeightFileError for a file that holds none.
    """
    if needs_own_reader(path):
        file = open_weights(path)
        weights = file.state_dict()
        reject_unread_layers(file, weights)
        weights = {
            name: value.dequantize() if is_packed(value) else value
            for name, value in weights.items()
        }
        metadata = file.text_metadata
    else:
        weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    vae = build_vae(weights, device, metadata)
    if vae.first_stage_model is None:
        raise WeightFileError(
            f"{os.path.basename(path)} holds no VAE that this ComfyUI knows ({len(weights)}"
            f" tensors, first {next(iter(weights), 'none')!r}). Pick another file, or update"
            " ComfyUI if the VAE is new."
        )
    Recipe(VAE, (str(path),), {"device": device}).attach(vae.patcher)
    return wrap_vae(vae)


def build_vae(weights: Mapping[str, torch.Tensor], device: torch.device | None,
              metadata: Mapping | None) -> comfy.sd.VAE:
    """The host's VAE of a file's weights and metadata, for a device; on the CPU it stays there
    between runs too."""
    vae = comfy.sd.VAE(sd=weights, device=device, metadata=metadata)
    if device is not None and device.type == "cpu" and vae.first_stage_model is not None:
        vae.patcher.offload_device = device
    return vae


@register_loader(VAE)
def _patcher(path: str, device: torch.device | None = None,
             disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The VAE again, for recipes. disable_dynamic: the host has no such choice for a VAE."""
    return load_vae(path, device).patcher
