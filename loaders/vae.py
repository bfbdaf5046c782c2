"""The VAE of a checkpoint or package: the host's own, with 16-bit weights held as the file has them.

Where the host computes in float32 it holds every weight so. Its layers cast at use when told to.
"""
import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.wan.vae import WanVAE
from comfy.ops import CastWeightBiasOp
from comfy.taesd.taesd import TAESD

NARROW = (torch.float16, torch.bfloat16)
# Those known to take the dtype of what they compute from their input; others read it from a weight.
KINDS = (AutoencodingEngine, TAESD, WanVAE)


def narrowed(vae: comfy.sd.VAE) -> comfy.sd.VAE:
    """Hold in 16 bits each float32 weight of a loaded VAE whose values have no more; it computes what it did. Returns `vae`."""
    model = vae.first_stage_model
    if not isinstance(model, KINDS) or vae.patcher.is_dynamic():
        return vae
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, CastWeightBiasOp) or weight is None or weight.ndim < 2 or weight.dtype != torch.float32:
            continue
        narrow = next(filter(lambda narrow: torch.equal(narrow.float(), weight), map(weight.to, NARROW)), None)
        if narrow is not None:
            module.weight = torch.nn.Parameter(narrow, requires_grad=False)
            module.comfy_cast_weights = True
    vae.size, vae.patcher.size = None, 0  # the host counts anew
    return vae
