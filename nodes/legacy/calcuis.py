"""Node ids of calcuis' gguf pack.

Four of them differ from ids of ComfyUI-GGUF only in capital letters.
"""
from comfy_api.latest import io

from ...loaders.devices import DEFAULT
from ..file_inputs import open_options
from ..node_text import loader_output
from . import LegacyNode, make_nodes, vae_files
from .gguf import (
    FOLDERS,
    ClipLoader,
    DualClipLoader,
    QuadrupleClipLoader,
    TripleClipLoader,
    clip_inputs,
    dtype_inputs,
    load_model,
    model_input,
)


def device_input():
    """Returns the input that chooses where a text encoder runs."""
    return io.Combo.Input(
        "device",
        options=open_options([DEFAULT, "cpu"]),
        default=DEFAULT,
        optional=True,
        advanced=True,
        tooltip="cpu: encode on the CPU and leave the GPU's memory to the diffusion model.",
    )


class Loader(LegacyNode):
    """Loads a diffusion model."""

    FUNCTION = "load_model"
    folders = FOLDERS

    @classmethod
    def load_model(
        cls, gguf_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None
    ) -> tuple:
        return loader_output(model=load_model(gguf_name))


class VaeLoader(LegacyNode):
    """Loads a VAE."""

    FUNCTION = "load_vae"
    outputs = (io.Vae.Output,)

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return vae_files.validate(vae_name)

    @classmethod
    def load_vae(cls, vae_name) -> tuple:
        return loader_output(vae=vae_files.load(vae_name))


# id: (base class, title, inputs, description)
NODE_CONFIG = {
    "LoaderGGUF": (
        Loader,
        "GGUF Loader",
        lambda: [model_input("gguf_name")],
        "The loader of workflows made with calcuis' gguf pack. Same as Load Diffusion Model"
        " (Featherweight).",
    ),
    "LoaderGGUFAdvanced": (
        Loader,
        "GGUF Loader (Advanced)",
        lambda: [model_input("gguf_name"), *dtype_inputs()],
        "The advanced loader of workflows made with calcuis' gguf pack, with a choice of dtypes.",
    ),
    "ClipLoaderGGUF": (
        ClipLoader,
        "GGUF CLIP Loader",
        lambda: [*clip_inputs(1, "CLIPLoader"), device_input()],
        "The text encoder loader of workflows made with calcuis' gguf pack. Same as Load Text"
        " Encoder (Featherweight).",
    ),
    "DualClipLoaderGGUF": (
        DualClipLoader,
        "GGUF DualCLIP Loader",
        lambda: [*clip_inputs(2, "DualCLIPLoader"), device_input()],
        "The loader for two text encoders of workflows made with calcuis' gguf pack.",
    ),
    "TripleClipLoaderGGUF": (
        TripleClipLoader,
        "GGUF TripleCLIP Loader",
        lambda: clip_inputs(3),
        "The loader for the three text encoders of SD3 in workflows made with calcuis' gguf pack.",
    ),
    "QuadrupleClipLoaderGGUF": (
        QuadrupleClipLoader,
        "GGUF QuadrupleCLIP Loader",
        lambda: clip_inputs(4),
        "The loader for the four text encoders of HiDream in workflows made with calcuis' gguf"
        " pack.",
    ),
    "VaeGGUF": (
        VaeLoader,
        "GGUF VAE Loader",
        lambda: [vae_files.vae_name_input()],
        "The VAE loader of workflows made with calcuis' gguf pack. Packed weights stay packed.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG, HELP_PAGE="LegacyCalcuis")
