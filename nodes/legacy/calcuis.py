"""Node ids of calcuis' gguf pack.

Four of them differ from ids of ComfyUI-GGUF only in capital letters.
"""
from . import make_nodes
from .loaders import ModelLoader, TextEncoderLoader
from .vae_files import VaeLoader

# id: (base class, method, title, inputs, description)
NODE_CONFIG = {
    "LoaderGGUF": (
        ModelLoader, "load_model", "GGUF Loader", "gguf_name",
        "The loader of workflows made with calcuis' gguf pack. Same as Load Diffusion Model"
        " (GGUF, Featherweight).",
    ),
    "LoaderGGUFAdvanced": (
        ModelLoader, "load_model", "GGUF Loader (Advanced)",
        "gguf_name dequant_dtype patch_dtype patch_on_device",
        "The advanced loader of workflows made with calcuis' gguf pack, with a choice of dtypes.",
    ),
    "ClipLoaderGGUF": (
        TextEncoderLoader, "load_clip", "GGUF CLIP Loader", "clip_name type device:encoder",
        "The text encoder loader of workflows made with calcuis' gguf pack. Same as Load Text"
        " Encoder (GGUF, Featherweight).",
    ),
    "DualClipLoaderGGUF": (
        TextEncoderLoader, "load_clip", "GGUF DualCLIP Loader",
        "clip_name1 clip_name2 type:dual device:encoder",
        "The loader for two text encoders of workflows made with calcuis' gguf pack.",
    ),
    "TripleClipLoaderGGUF": (
        TextEncoderLoader, "load_clip", "GGUF TripleCLIP Loader",
        "clip_name1 clip_name2 clip_name3",
        "The loader for the three text encoders of SD3 in workflows made with calcuis' gguf pack.",
    ),
    "QuadrupleClipLoaderGGUF": (
        TextEncoderLoader, "load_clip", "GGUF QuadrupleCLIP Loader",
        "clip_name1 clip_name2 clip_name3 clip_name4",
        "The loader for the four text encoders of HiDream in workflows made with calcuis' gguf"
        " pack.",
    ),
    "VaeGGUF": (
        VaeLoader, "load_vae", "GGUF VAE Loader", "vae_name",
        "The VAE loader of workflows made with calcuis' gguf pack. Packed weights stay packed.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG, HELP_PAGE="LegacyCalcuis")
