"""Node ids of ComfyUI-GGUF, with the inputs and loading that the other packs' nodes share."""
from collections.abc import Sequence

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...loaders.devices import DEFAULT, device_options, find_device
from ...loaders.files.open_weights import open_weights
from ...loaders.models.diffusion import load_diffusion_model
from ...loaders.models.loader_choice import needs_own_reader
from ...loaders.models.text_encoder import load_text_encoder
from ...loaders.paths.folders import embedding_folders, find_file, list_files
from ..combo_options import encoder_types
from ..file_inputs import file_options
from ..load_diffusion_model import FOLDERS
from ..load_text_encoder import FOLDERS as CLIP_FOLDERS
from ..node_text import loader_output
from . import LegacyNode, make_nodes

# of ComfyUI-GGUF's inputs, which change nothing: values are dequantised in float32 and rounded once
DTYPES = ["default", "target", "float32", "float16", "bfloat16"]


def model_input(name: str = "unet_name", folders: Sequence[str] = ()):
    """Returns the input for a diffusion model. folders: model folders that are offered too."""
    return io.Combo.Input(
        name,
        options=[*list_files(*FOLDERS), *folders],
        tooltip="A file in models/diffusion_models or models/unet.",
    )


def dtype_inputs() -> list:
    """Returns the inputs of ComfyUI-GGUF's advanced loader."""
    return [
        *(
            io.Combo.Input(name, options=DTYPES, default="default", optional=True, tooltip=tooltip)
            for name, tooltip in (
                (
                    "dequant_dtype",
                    "Kept for old workflows. Weights are dequantised in float32 and rounded once,"
                    " to the dtype that the model computes in.",
                ),
                (
                    "patch_dtype",
                    "Kept for old workflows. Patches are added in float32 and rounded once.",
                ),
            )
        ),
        io.Boolean.Input(
            "patch_on_device",
            default=False,
            optional=True,
            tooltip="Kept for old workflows. ComfyUI places patches by itself.",
        ),
    ]


def load_model(name: str, **options) -> ModelPatcher:
    """Loads a diffusion model.

    Args:
        name: a file or folder in `FOLDERS`.
        options: further arguments of `load_diffusion_model`.
    """
    return load_diffusion_model(find_file(name, *FOLDERS), **options)


class UnetLoader(LegacyNode):
    """Loads a diffusion model."""

    FUNCTION = "load_unet"
    folders = FOLDERS

    @classmethod
    def load_unet(
        cls, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None
    ) -> tuple:
        return loader_output(model=load_model(unet_name))


def clip_inputs(count: int, host_node: str | None = None) -> list:
    """Returns the inputs of a text encoder loader.

    Args:
        count: how many files it takes, 1 to 4.
        host_node: the host's node with the same types; None: no type input.
    """
    names = [f"clip_name{number}" for number in range(1, count + 1)] if count > 1 else ["clip_name"]
    tooltip = "A file in models/text_encoders or models/clip: GGUF, NF4 or any other, in any order."
    files = list_files(*CLIP_FOLDERS)
    further = file_options(files, CLIP_FOLDERS, names[0])
    inputs = [
        io.Combo.Input(name, options=further if name != names[0] else files, tooltip=tooltip)
        for name in names
    ]
    if host_node:
        type_input = io.Combo.Input(
            "type",
            options=encoder_types(host_node),
            tooltip="The kind of model the text is encoded for.",
        )
        inputs.append(type_input)
    return inputs


def load_clip(clip_type: str, *names: str, device: torch.device | None = None) -> comfy.sd.CLIP:
    """Loads text encoders as one CLIP.

    Args:
        clip_type: an option of the type input.
        names: files in `CLIP_FOLDERS`.
        device: where it runs; None: where the host decides.
    """
    paths = [find_file(name, *CLIP_FOLDERS) for name in names]
    return load_text_encoder(
        paths, clip_type, embedding_folders(), model_options=device_options(device)
    )


class TextEncoderLoader(LegacyNode):
    """Base of the loaders for one to four text encoders.

    Callers use `load_clip`, or the two steps `load_data` and `load_patcher`.
    """

    FUNCTION = "load_clip"
    folders = CLIP_FOLDERS
    outputs = (io.Clip.Output,)

    @staticmethod
    def load(clip_type: str, *names: str, device: str = DEFAULT) -> tuple:
        device, note = find_device(device)
        return loader_output(note, clip=load_clip(clip_type, *names, device=device))

    @staticmethod
    def load_data(ckpt_paths) -> list[dict]:
        """Returns a state dict of each file, with the file's own keys.

        Packed weights stay packed and are mapped from the file.
        """
        return [
            open_weights(path).state_dict()
            if needs_own_reader(path)
            else comfy.utils.load_torch_file(path, safe_load=True)
            for path in ckpt_paths
        ]

    @staticmethod
    def load_patcher(clip_paths, clip_type: comfy.sd.CLIPType, clip_data=None) -> comfy.sd.CLIP:
        """Loads the text encoders in these files.

        clip_data is not used, because it lacks metadata that is needed to load them.
        """
        return load_text_encoder(list(clip_paths), clip_type.name.lower(), embedding_folders())


class ClipLoader(TextEncoderLoader):
    """Loads one text encoder."""

    @classmethod
    def load_clip(cls, clip_name, type="stable_diffusion", device=DEFAULT) -> tuple:
        return cls.load(type, clip_name, device=device)


class DualClipLoader(TextEncoderLoader):
    """Loads two text encoders."""

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, type, device=DEFAULT) -> tuple:
        return cls.load(type, clip_name1, clip_name2, device=device)


class TripleClipLoader(TextEncoderLoader):
    """Loads the three text encoders of SD3."""

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, type="sd3") -> tuple:
        # there is only one set of three, whatever type a caller names
        return cls.load("sd3", clip_name1, clip_name2, clip_name3)


class QuadrupleClipLoader(TextEncoderLoader):
    """Loads the four text encoders of HiDream."""

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, clip_name4, type="hidream") -> tuple:
        # there is only one set of four, whatever type a caller names
        return cls.load("hidream", clip_name1, clip_name2, clip_name3, clip_name4)


# id: (base class, title, inputs, description)
NODE_CONFIG = {
    "UnetLoaderGGUF": (
        UnetLoader,
        "Unet Loader (GGUF)",
        lambda: [model_input()],
        "The loader of ComfyUI-GGUF workflows. Same as Load Diffusion Model (Featherweight).",
    ),
    "UnetLoaderGGUFAdvanced": (
        UnetLoader,
        "Unet Loader (GGUF/Advanced)",
        lambda: [model_input(), *dtype_inputs()],
        "The advanced loader of ComfyUI-GGUF workflows, with a choice of dtypes.",
    ),
    "CLIPLoaderGGUF": (
        ClipLoader,
        "CLIPLoader (GGUF)",
        lambda: clip_inputs(1, "CLIPLoader"),
        "The text encoder loader of ComfyUI-GGUF workflows. Same as Load Text Encoder"
        " (Featherweight).",
    ),
    "DualCLIPLoaderGGUF": (
        DualClipLoader,
        "DualCLIPLoader (GGUF)",
        lambda: clip_inputs(2, "DualCLIPLoader"),
        "The loader for two text encoders of ComfyUI-GGUF workflows.",
    ),
    "TripleCLIPLoaderGGUF": (
        TripleClipLoader,
        "TripleCLIPLoader (GGUF)",
        lambda: clip_inputs(3),
        "The loader for the three text encoders of SD3 in ComfyUI-GGUF workflows.",
    ),
    "QuadrupleCLIPLoaderGGUF": (
        QuadrupleClipLoader,
        "QuadrupleCLIPLoader (GGUF)",
        lambda: clip_inputs(4),
        "The loader for the four text encoders of HiDream in ComfyUI-GGUF workflows.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG)
