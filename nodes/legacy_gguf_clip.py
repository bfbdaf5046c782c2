"""Text encoder ids of ComfyUI-GGUF, with the same inputs in the same order, so that shared workflows open and run."""
from comfy_api.latest import io

from ..loaders.folders import embedding_folders, find_file, list_files
from ..loaders.text_encoder import load_text_encoder
from .load_text_encoder import FOLDERS, encoder_types
from .shown import NEEDED, loaded

CATEGORY = "Featherweight/legacy"
TOOLTIP = "A file in models/text_encoders or models/clip: GGUF, NF4 or any other, in any order."


def name_input(name: str):
    return io.Combo.Input(name, options=list_files(*FOLDERS), tooltip=TOOLTIP)


def type_input(host_node: str):
    return io.Combo.Input("type", options=encoder_types(host_node), tooltip="The kind of model the text is encoded for.")


def load(node: type[io.ComfyNode], clip_type: str, *names: str) -> io.NodeOutput:
    paths = [find_file(name, *FOLDERS) for name in names]
    return loaded(node, clip=load_text_encoder(paths, clip_type, embedding_folders()))


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderGGUF",
            display_name="CLIPLoader (GGUF)",
            category=CATEGORY,
            description="The text encoder loader of ComfyUI-GGUF workflows. Same as Load Text Encoder (Featherweight).",
            inputs=[name_input("clip_name"), type_input("CLIPLoader")],
            hidden=NEEDED,
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name):
        return True  # names from other systems are resolved, and missing files explained, when the node runs

    @classmethod
    def execute(cls, clip_name, type="stable_diffusion") -> io.NodeOutput:
        return load(cls, type, clip_name)


class DualCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderGGUF",
            display_name="DualCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for two text encoders of ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), type_input("DualCLIPLoader")],
            hidden=NEEDED,
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1, clip_name2):
        return True

    @classmethod
    def execute(cls, clip_name1, clip_name2, type) -> io.NodeOutput:
        return load(cls, type, clip_name1, clip_name2)


class TripleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderGGUF",
            display_name="TripleCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for the three text encoders of SD3 in ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3")],
            hidden=NEEDED,
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1, clip_name2, clip_name3):
        return True

    @classmethod
    def execute(cls, clip_name1, clip_name2, clip_name3) -> io.NodeOutput:
        return load(cls, "sd3", clip_name1, clip_name2, clip_name3)


class QuadrupleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderGGUF",
            display_name="QuadrupleCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for the four text encoders of HiDream in ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3"), name_input("clip_name4")],
            hidden=NEEDED,
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1, clip_name2, clip_name3, clip_name4):
        return True

    @classmethod
    def execute(cls, clip_name1, clip_name2, clip_name3, clip_name4) -> io.NodeOutput:
        return load(cls, "hidream", clip_name1, clip_name2, clip_name3, clip_name4)
