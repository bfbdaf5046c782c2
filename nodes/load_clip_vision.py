"""The node Load CLIP Vision (Featherweight)."""
from comfy_api.latest import io

from ..loaders.comfyui.who_computes import AUTOMATIC
from ..loaders.models.clip_vision import load_clip_vision
from ..loaders.models.compute_choice import CHOICES_OF_SIDE_MODELS
from ..loaders.paths.folders import (
    CLIP_VISION,
    find_file,
    list_files,
    list_model_folders,
    validate_files,
)
from .load_diffusion_model import NO_CHANGE, compute_input, pack_to_input, packed_type
from .node_text import loader_output
from .search_words import family_aliases

FOLDERS = ("clip_vision_gguf", "clip_vision")


class LoadCLIPVision(io.ComfyNode):
    """Loads a CLIP vision model and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadCLIPVision",
            display_name="Load CLIP Vision (Featherweight)",
            category="Featherweight",
            description="Loads a CLIP vision model (CLIP, SigLIP, DINO) from GGUF or any other"
            " packed file that this pack reads (NF4, int8, fp8, SDNQ …) and keeps its weights"
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
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=[
                        *list_files(*FOLDERS),
                        *list_model_folders(*FOLDERS, model_class=CLIP_VISION),
                    ],
                    display_name="CLIP vision",
                    tooltip="A file in models/clip_vision, or a folder that transformers saved"
                    " there.",
                ),
                pack_to_input("the CLIP vision model"),
                compute_input("the CLIP vision model", CHOICES_OF_SIDE_MODELS),
            ],
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name=None):
        return validate_files(clip_name, keys=FOLDERS)

    @classmethod
    def execute(cls, clip_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(clip_name, *FOLDERS)
        clip_vision = load_clip_vision(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(clip_vision=clip_vision))
