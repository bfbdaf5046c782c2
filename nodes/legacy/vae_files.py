"""VAEs by the names that nodes of other packs offer.

A name is a file, GGUF or not, or one of the host's own VAE loader, such as taesd, which it makes
from several files.
"""
import comfy.sd
import torch
from comfy_api.latest import io

from ...loaders.models.vae import build_vae, load_vae
from ...loaders.paths.folders import find_file
from ..combo_options import host_node
from .inputs import VAE_FOLDERS, host_vae_names
from .loaders import Loader

PIXEL_SPACE = "pixel_space"  # the only name of the host's loader without weights


def load(vae_name: str, device: torch.device | None = None) -> comfy.sd.VAE:
    """Loads a VAE.

    Args:
        vae_name: an option of the input of that name.
        device: where it runs; None: where the host decides.
    """
    if _is_file(vae_name):
        return load_vae(find_file(vae_name, *VAE_FOLDERS), device)
    host = host_node("VAELoader")
    if device is None:
        return host().load_vae(vae_name)[0]
    # from here on as the host's loader does
    if vae_name == PIXEL_SPACE:
        weights = {"pixel_space_vae": torch.tensor(1.0)}
    else:
        weights = host.load_taesd(vae_name)
    return build_vae(weights, device, {"tae_latent_channels": 128} if vae_name == "taef2" else None)


def _is_file(vae_name) -> bool:
    return "." in str(vae_name) or vae_name not in host_vae_names()


class VaeLoader(Loader):
    """Loads a VAE."""

    outputs = (io.Vae.Output,)

    @classmethod
    def load(cls, name, device) -> dict:
        return {"vae": load(name, device)}
