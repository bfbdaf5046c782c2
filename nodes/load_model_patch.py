"""The node Load Model Patch (Featherweight)."""
from comfy_api.latest import io

from ..loaders.comfyui.who_computes import AUTOMATIC
from ..loaders.models.compute_choice import CHOICES_OF_SIDE_MODELS
from ..loaders.models.model_patch import load_model_patch
from ..loaders.paths.folders import (
    MODEL_PATCH,
    find_file,
    list_files,
    list_model_folders,
    validate_files,
)
from .load_diffusion_model import NO_CHANGE, compute_input, pack_to_input, packed_type
from .node_text import loader_output
from .search_words import family_aliases

FOLDERS = ("model_patches_gguf", "model_patches")


class LoadModelPatch(io.ComfyNode):
    """Loads a model patch and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadModelPatch",
            display_name="Load Model Patch (Featherweight)",
            category="Featherweight",
            description="Loads a model patch (Z-Image Fun or Qwen-Image DiffSynth ControlNet,"
            " Uni3C, InfiniteTalk, USO, SUPIR, LLLite) from GGUF or any other packed file that"
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
            inputs=[
                io.Combo.Input(
                    "model_patch_name",
                    options=[
                        *list_files(*FOLDERS),
                        *list_model_folders(*FOLDERS, model_class=MODEL_PATCH),
                    ],
                    display_name="model patch",
                    tooltip="A file in models/model_patches, or a folder that diffusers saved"
                    " there.",
                ),
                pack_to_input("the model patch"),
                compute_input("the model patch", CHOICES_OF_SIDE_MODELS),
            ],
            outputs=[io.ModelPatch.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_patch_name=None):
        return validate_files(model_patch_name, keys=FOLDERS)

    @classmethod
    def execute(cls, model_patch_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(model_patch_name, *FOLDERS)
        model_patch = load_model_patch(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(model_patch=model_patch))
