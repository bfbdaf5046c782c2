"""VAEs by the names that nodes of other packs offer: files, GGUF among them, and what the host's
own loader puts together."""
import comfy.sd
import torch
from comfy_api.latest import io

import nodes as host_nodes

from ...loaders.folders import find_file, list_files, validate_files
from ...loaders.vae import build_vae, load_vae
from ..combo_options import combo_options

FOLDERS = ("vae_gguf", "vae", "vae_approx")
PIXEL_SPACE = "pixel_space"  # the one name of the host's loader that stands for no weights


def vae_name_input():
    gguf = [name for name in list_files("vae_gguf") if name.lower().endswith(".gguf")]
    return io.Combo.Input(
        "vae_name",
        options=[*gguf, *_of_the_host()],
        tooltip="A file in models/vae or models/vae_approx.",
    )


def is_there(vae_name: str | None = None) -> bool | str:
    """For a node's `validate_inputs`, see `validate_files`."""
    return not _is_file(vae_name) or validate_files(vae_name, keys=FOLDERS)


def load(vae_name: str, device: torch.device | None = None) -> comfy.sd.VAE:
    """The VAE of a file; or of a name that is none, such as taesd, what the host's loader makes of
    it.

    device: where it runs; None: where the host has it.
    """
    if _is_file(vae_name):
        return load_vae(find_file(vae_name, *FOLDERS), device)
    host = host_nodes.NODE_CLASS_MAPPINGS["VAELoader"]
    if device is None:
        return host().load_vae(vae_name)[0]
    weights = (
        {"pixel_space_vae": torch.tensor(1.0)}
        if vae_name == PIXEL_SPACE
        else host.load_taesd(vae_name)
    )
    # as the host's loader does
    return build_vae(weights, device, {"tae_latent_channels": 128} if vae_name == "taef2" else None)


def _is_file(vae_name) -> bool:
    return "." in str(vae_name) or vae_name not in _of_the_host()


def _of_the_host() -> list[str]:
    return combo_options(host_nodes.NODE_CLASS_MAPPINGS["VAELoader"], "vae_name")
