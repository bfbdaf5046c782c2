"""VAEs by the names that nodes of other packs offer: files, GGUF among them, and what the host's own loader puts together."""
import comfy.sd
import nodes as host_nodes
import torch
from comfy_api.latest import io

from ..loaders.folders import find_file, list_files
from ..loaders.vae import load_vae
from .choices import choices_of

FOLDERS = ("vae_gguf", "vae", "vae_approx")


def vae_name_input():
    gguf = [name for name in list_files("vae_gguf") if name.lower().endswith(".gguf")]
    return io.Combo.Input("vae_name", options=[*gguf, *_of_the_host()], tooltip="A file in models/vae or models/vae_approx.")


def load(vae_name: str, device: torch.device | None = None) -> comfy.sd.VAE:
    """The VAE of a file; or of a name that is none, such as taesd, what the host's loader makes of it, on its own device."""
    if "." not in vae_name and vae_name in _of_the_host():
        return host_nodes.NODE_CLASS_MAPPINGS["VAELoader"]().load_vae(vae_name)[0]
    return load_vae(find_file(vae_name, *FOLDERS), device)


def _of_the_host() -> list[str]:
    return choices_of(host_nodes.NODE_CLASS_MAPPINGS["VAELoader"], "vae_name")
