"""The node Load ControlNet (Featherweight)."""
from comfy_api.latest import io

from ..loaders.comfyui.who_computes import AUTOMATIC
from ..loaders.models.compute_choice import CHOICES_OF_SIDE_MODELS
from ..loaders.models.controlnet import load_controlnet
from ..loaders.paths.folders import (
    CONTROLNET,
    find_file,
    list_files,
    list_model_folders,
    validate_files,
)
from .load_diffusion_model import NO_CHANGE, compute_input, pack_to_input, packed_type
from .node_text import loader_output
from .search_words import family_aliases

FOLDERS = ("controlnet_gguf", "controlnet")


class LoadControlNet(io.ComfyNode):
    """Loads a ControlNet and keeps its packed weights packed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FeatherweightLoadControlNet",
            display_name="Load ControlNet (Featherweight)",
            category="Featherweight",
            description="Loads a ControlNet from GGUF or any other packed file that this pack"
            " reads (NF4, int8, fp8, SDNQ …) and keeps its weights packed in memory, for ComfyUI's"
            " Apply ControlNet. Other files load as with ComfyUI's own loader.",
            search_aliases=[
                "controlnet",
                "control net",
                "controlnet loader",
                "t2i adapter",
                *family_aliases("controlnet"),
            ],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=[
                        *list_files(*FOLDERS),
                        *list_model_folders(*FOLDERS, model_class=CONTROLNET),
                    ],
                    display_name="ControlNet",
                    tooltip="A file in models/controlnet, or a folder that diffusers saved there.",
                ),
                pack_to_input("the ControlNet"),
                compute_input("the ControlNet", CHOICES_OF_SIDE_MODELS),
            ],
            outputs=[io.ControlNet.Output()],
        )

    @classmethod
    def validate_inputs(cls, control_net_name=None):
        return validate_files(control_net_name, keys=FOLDERS)

    @classmethod
    def execute(cls, control_net_name, pack_to=NO_CHANGE, compute=AUTOMATIC) -> io.NodeOutput:
        path = find_file(control_net_name, *FOLDERS)
        control_net = load_controlnet(path, packed_type(pack_to), compute)
        return io.NodeOutput(*loader_output(control_net=control_net))
