"""Node ids of calcuis' gguf pack, with the same inputs in the same order, so that shared workflows open and run.

Four of them differ from ids of ComfyUI-GGUF in nothing but capital letters. They are called as Python too, see `legacy_gguf`.
"""
from comfy_api.latest import io

from ..loaders.devices import DEFAULT
from ..loaders.folders import all_there
from . import legacy_gguf, legacy_gguf_clip, vae_files
from .shown import loaded

CATEGORY = "Featherweight/legacy"
HELP = "LegacyCalcuis"
name_input, type_input = legacy_gguf_clip.name_input, legacy_gguf_clip.type_input


def device_input():
    return io.Combo.Input("device", options=[DEFAULT, "cpu"], default=DEFAULT, optional=True, advanced=True,
                          tooltip="cpu: encode on the CPU and leave the GPU's memory to the diffusion model.")


class Loader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoaderGGUF",
            display_name="GGUF Loader",
            category=CATEGORY,
            description="The loader of workflows made with calcuis' gguf pack. Same as Load Diffusion Model (Featherweight).",
            inputs=[legacy_gguf.model_name_input("gguf_name")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, gguf_name=None):
        return all_there(gguf_name, keys=legacy_gguf.FOLDERS)

    @classmethod
    def load_model(cls, gguf_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None) -> tuple:
        return legacy_gguf.load(gguf_name, dequant_dtype, patch_dtype)

    FUNCTION, execute = "load_model", load_model


class LoaderAdvanced(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoaderGGUFAdvanced",
            display_name="GGUF Loader (Advanced)",
            category=CATEGORY,
            description="The advanced loader of workflows made with calcuis' gguf pack, with a choice of dtypes.",
            inputs=[legacy_gguf.model_name_input("gguf_name"), *legacy_gguf.dtype_inputs()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, gguf_name=None):
        return all_there(gguf_name, keys=legacy_gguf.FOLDERS)

    @classmethod
    def load_model(cls, gguf_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None) -> tuple:
        return legacy_gguf.load(gguf_name, dequant_dtype, patch_dtype)

    FUNCTION, execute = "load_model", load_model


class ClipLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ClipLoaderGGUF",
            display_name="GGUF CLIP Loader",
            category=CATEGORY,
            description="The text encoder loader of workflows made with calcuis' gguf pack. Same as Load Text Encoder"
                        " (Featherweight).",
            inputs=[name_input("clip_name"), type_input("CLIPLoader"), device_input()],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name=None, device=DEFAULT):
        return all_there(clip_name, keys=legacy_gguf_clip.FOLDERS)

    @classmethod
    def load_clip(cls, clip_name, type="stable_diffusion", device=DEFAULT) -> tuple:
        return legacy_gguf_clip.load(type, clip_name, device=device)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(legacy_gguf_clip.load_data), staticmethod(legacy_gguf_clip.load_patcher)


class DualClipLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DualClipLoaderGGUF",
            display_name="GGUF DualCLIP Loader",
            category=CATEGORY,
            description="The loader for two text encoders of workflows made with calcuis' gguf pack.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), type_input("DualCLIPLoader"), device_input()],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, device=DEFAULT):
        return all_there(clip_name1, clip_name2, keys=legacy_gguf_clip.FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, type, device=DEFAULT) -> tuple:
        return legacy_gguf_clip.load(type, clip_name1, clip_name2, device=device)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(legacy_gguf_clip.load_data), staticmethod(legacy_gguf_clip.load_patcher)


class TripleClipLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TripleClipLoaderGGUF",
            display_name="GGUF TripleCLIP Loader",
            category=CATEGORY,
            description="The loader for the three text encoders of SD3 in workflows made with calcuis' gguf pack.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, clip_name3=None):
        return all_there(clip_name1, clip_name2, clip_name3, keys=legacy_gguf_clip.FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, type="sd3") -> tuple:
        return legacy_gguf_clip.load("sd3", clip_name1, clip_name2, clip_name3)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(legacy_gguf_clip.load_data), staticmethod(legacy_gguf_clip.load_patcher)


class QuadrupleClipLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuadrupleClipLoaderGGUF",
            display_name="GGUF QuadrupleCLIP Loader",
            category=CATEGORY,
            description="The loader for the four text encoders of HiDream in workflows made with calcuis' gguf pack.",
            inputs=[name_input("clip_name1"), name_input("clip_name2"), name_input("clip_name3"), name_input("clip_name4")],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, clip_name3=None, clip_name4=None):
        return all_there(clip_name1, clip_name2, clip_name3, clip_name4, keys=legacy_gguf_clip.FOLDERS)

    @classmethod
    def load_clip(cls, clip_name1, clip_name2, clip_name3, clip_name4, type="hidream") -> tuple:
        return legacy_gguf_clip.load("hidream", clip_name1, clip_name2, clip_name3, clip_name4)

    FUNCTION, execute = "load_clip", load_clip
    load_data, load_patcher = staticmethod(legacy_gguf_clip.load_data), staticmethod(legacy_gguf_clip.load_patcher)


class VaeLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VaeGGUF",
            display_name="GGUF VAE Loader",
            category=CATEGORY,
            description="The VAE loader of workflows made with calcuis' gguf pack. The weights of a GGUF file are unpacked.",
            inputs=[vae_files.vae_name_input()],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return vae_files.is_there(vae_name)

    @classmethod
    def load_vae(cls, vae_name) -> tuple:
        return loaded(vae=vae_files.load(vae_name))

    FUNCTION, execute = "load_vae", load_vae
