"""Node ids of ComfyUI-GGUF."""
from . import make_nodes
from .loaders import ModelLoader, TextEncoderLoader

# id: (base class, method, title, inputs, description)
NODE_CONFIG = {
    "UnetLoaderGGUF": (
        ModelLoader, "load_unet", "Unet Loader (GGUF)", "unet_name",
        "The loader of ComfyUI-GGUF workflows. Same as Load Diffusion Model (GGUF, Featherweight).",
    ),
    "UnetLoaderGGUFAdvanced": (
        ModelLoader, "load_unet", "Unet Loader (GGUF/Advanced)",
        "unet_name dequant_dtype patch_dtype patch_on_device",
        "The advanced loader of ComfyUI-GGUF workflows, with a choice of dtypes.",
    ),
    "CLIPLoaderGGUF": (
        TextEncoderLoader, "load_clip", "CLIPLoader (GGUF)", "clip_name type",
        "The text encoder loader of ComfyUI-GGUF workflows. Same as Load Text Encoder"
        " (GGUF, Featherweight).",
    ),
    "DualCLIPLoaderGGUF": (
        TextEncoderLoader, "load_clip", "DualCLIPLoader (GGUF)", "clip_name1 clip_name2 type:dual",
        "The loader for two text encoders of ComfyUI-GGUF workflows.",
    ),
    "TripleCLIPLoaderGGUF": (
        TextEncoderLoader, "load_clip", "TripleCLIPLoader (GGUF)",
        "clip_name1 clip_name2 clip_name3",
        "The loader for the three text encoders of SD3 in ComfyUI-GGUF workflows.",
    ),
    "QuadrupleCLIPLoaderGGUF": (
        TextEncoderLoader, "load_clip", "QuadrupleCLIPLoader (GGUF)",
        "clip_name1 clip_name2 clip_name3 clip_name4",
        "The loader for the four text encoders of HiDream in ComfyUI-GGUF workflows.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG)
