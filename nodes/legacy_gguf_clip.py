"""Text encoder ids of ComfyUI-GGUF, with the same inputs in the same order, so that shared workflows open and run.

They are called as Python too, see `legacy_gguf`; in one piece by `load_clip`, or by `load_data` and `load_patcher`.
"""
import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ..loaders.devices import DEFAULT, device_options, find_device
from ..loaders.files import open_weights
from ..loaders.folders import all_there, embedding_folders, find_file, list_files
from ..loaders.handover import is_ours
from ..loaders.text_encoder import load_text_encoder
from .choices import encoder_types
from .load_text_encoder import FOLDERS
from .shown import loaded

CATEGORY = "Featherweight/legacy"
TOOLTIP = "A file in models/text_encoders or models/clip: GGUF, NF4 or any other, in any order."


def name_input(name: str):
    return io.Combo.Input(name, options=list_files(*FOLDERS), tooltip=TOOLTIP)


def type_input(host_node: str):
    return io.Combo.Input("type", options=encoder_types(host_node), tooltip="The kind of model the text is encoded for.")


def load(clip_type: str, *names: str, device: str = DEFAULT) -> tuple:
    paths = [find_file(name, *FOLDERS) for name in names]
    device, note = find_device(device)
    return loaded(note, clip=load_text_encoder(paths, clip_type, embedding_folders(), model_options=device_options(device)))


def load_data(ckpt_paths) -> list[dict]:
    """Name -> tensor of each file, by the file's own names. Packed weights are packed and lie in the mapped file."""
    return [open_weights(path).state_dict() if is_ours(path) else comfy.utils.load_torch_file(path, safe_load=True)
            for path in ckpt_paths]


def load_patcher(clip_paths, clip_type: comfy.sd.CLIPType, clip_data=None) -> comfy.sd.CLIP:
    """The text encoders in these files. clip_data is not looked at: what it lacks of the files is needed to load them."""
    return load_text_encoder(list(clip_paths), clip_type.name.lower(), embedding_folders())


class CLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPLoaderGGUF",
            display_name="CLIPLoader (GGUF)",
            category=CATEGORY,
            description="The text encoder loader of ComfyUI-GGUF workflows. Same as Load Text Encoder (Featherweight).",
            inputs=[name_input("clip_name"), type_input("CLIPLoader")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name=None):
        return all_there(clip_name, keys=FOLDERS)

    @classmethod
    def load_clip(cls, clip_name, type="stable_diffusion") -> tuple:
        return load(type, clip_name)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(load_data), staticmethod(load_patcher)


class DualCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualCLIPLoaderGGUF",
            display_name="DualCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for two text encoders of ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), type_input("DualCLIPLoader")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None):
        return all_there(clip_name1, clip_name2, keys=FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, type) -> tuple:
        return load(type, clip_name1, clip_name2)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(load_data), staticmethod(load_patcher)


class TripleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleCLIPLoaderGGUF",
            display_name="TripleCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for the three text encoders of SD3 in ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, clip_name3=None):
        return all_there(clip_name1, clip_name2, clip_name3, keys=FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, type="sd3") -> tuple:
        return load("sd3", clip_name1, clip_name2, clip_name3)  # whatever type a caller names, there is one set of three

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(load_data), staticmethod(load_patcher)


class QuadrupleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleCLIPLoaderGGUF",
            display_name="QuadrupleCLIPLoader (GGUF)",
            category=CATEGORY,
            description="The loader for the four text encoders of HiDream in ComfyUI-GGUF workflows.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3"), name_input("clip_name4")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, clip_name3=None, clip_name4=None):
        return all_there(clip_name1, clip_name2, clip_name3, clip_name4, keys=FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, clip_name4, type="hidream") -> tuple:
        return load("hidream", clip_name1, clip_name2, clip_name3, clip_name4)  # whatever type a caller names, as above

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(load_data), staticmethod(load_patcher)
