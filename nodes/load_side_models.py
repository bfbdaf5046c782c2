"""The nodes Load ControlNet, Load Model Patch and Load CLIP Vision (Featherweight)."""
import re

from comfy_api.latest import io

from ..loaders.comfyui.compute import AUTOMATIC, CHOICES_OF_SIDE_MODELS
from ..loaders.models.clip_vision import load_clip_vision
from ..loaders.models.controlnet import load_controlnet
from ..loaders.models.model_patch import load_model_patch
from ..loaders.paths.folders import (
    CLIP_VISION,
    CONTROLNET,
    MODEL_PATCH,
    find_file,
)
from .file_inputs import file_input, list_options
from .load_diffusion_model import NO_CHANGE, compute_input, pack_to_input, packed_type
from .node_text import loader_output
from .search_words import family_aliases

CONTROLNET_FOLDERS = ("controlnet_gguf", "controlnet")
MODEL_PATCH_FOLDERS = ("model_patches_gguf", "model_patches")
CLIP_VISION_FOLDERS = ("clip_vision_gguf", "clip_vision")


def _inputs(name: str, folders: tuple[str, ...], model_class: re.Pattern, title: str, what: str,
            saved_by: str) -> list:
    """Returns the inputs of a node: the file, and how it is packed and computed.

    Args:
        name: of the input for the file.
        folders: keys of the folders that the file lies in.
        model_class: of the folders that are listed too, see `list_model_folders`.
        title: of the input.
        what: the model, for the texts.
        saved_by: the library that saves it as a folder.
    """
    return [
        file_input(
            name,
            list_options(*folders, model_class=model_class),
            display_name=title,
            tooltip=f"A file in models/{folders[-1]}, or a folder that {saved_by} saved there.",
        ),
        pack_to_input(what),
        compute_input(what, CHOICES_OF_SIDE_MODELS),
    ]


class LoadControlNet(io.ComfyNode):
    """Loads a ControlNet and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadControlNet",
            display_name="Load ControlNet (Featherweight)",
            category="Featherweight",
            description="Loads a ControlNet from GGUF or any other quantized file that this pack"
            " reads (NF4, int8, fp8, SDNQ …) and keeps its weights packed in memory, for ComfyUI's"
            " Apply ControlNet. Other files load as with ComfyUI's own loader.",
            search_aliases=[
                "controlnet",
                "control net",
                "controlnet loader",
                "t2i adapter",
                *family_aliases("controlnet"),
            ],
            inputs=_inputs("control_net_name", CONTROLNET_FOLDERS, CONTROLNET, "ControlNet",
                           "the ControlNet", "diffusers"),
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def execute(cls, control_net_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(control_net_name, *CONTROLNET_FOLDERS)
        control_net = load_controlnet(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(control_net=control_net))


class LoadModelPatch(io.ComfyNode):
    """Loads a model patch and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadModelPatch",
            display_name="Load Model Patch (Featherweight)",
            category="Featherweight/more loaders",
            description="Loads a model patch (Z-Image Fun or Qwen-Image DiffSynth ControlNet,"
            " Uni3C, InfiniteTalk, USO, SUPIR, LLLite) from GGUF or any other quantized file that"
            " this pack reads (NF4, int8, fp8, SDNQ …) and keeps its weights packed in memory."
            " Other files load as with ComfyUI's own loader.",
            search_aliases=[
                "model patch",
                "modelpatchloader",
                "z-image controlnet",
                "diffsynth",
                "uni3c",
                "infinitetalk",
                "supir",
                *family_aliases("model patch"),
            ],
            inputs=_inputs("model_patch_name", MODEL_PATCH_FOLDERS, MODEL_PATCH, "model patch",
                           "the model patch", "diffusers"),
            outputs=[io.ModelPatch.Output()],
        )

    @classmethod
    def execute(cls, model_patch_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(model_patch_name, *MODEL_PATCH_FOLDERS)
        model_patch = load_model_patch(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(model_patch=model_patch))


class LoadCLIPVision(io.ComfyNode):
    """Loads a CLIP vision model and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadCLIPVision",
            display_name="Load CLIP Vision (Featherweight)",
            category="Featherweight/more loaders",
            description="Loads a CLIP vision model (CLIP, SigLIP, DINO) from GGUF or any other"
            " quantized file that this pack reads (NF4, int8, fp8, SDNQ …) and keeps its weights"
            " packed in memory, for ComfyUI's CLIP Vision Encode. Other files load as with"
            " ComfyUI's own loader.",
            search_aliases=[
                "clip vision",
                "clip vision loader",
                "siglip",
                "dinov2",
                "image encoder",
                *family_aliases("clip vision"),
            ],
            inputs=_inputs("clip_name", CLIP_VISION_FOLDERS, CLIP_VISION, "CLIP vision",
                           "the CLIP vision model", "transformers"),
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls, clip_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(clip_name, *CLIP_VISION_FOLDERS)
        clip_vision = load_clip_vision(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(clip_vision=clip_vision))
