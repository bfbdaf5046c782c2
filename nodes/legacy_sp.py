"""Node ids of bananasss00's NF4 loaders, with the same inputs in the same order, so that shared workflows open and run.

They pack what is not packed yet to NF4. They are called as Python too, see `legacy_gguf`.
"""
from comfy_api.latest import io

from ..loaders.checkpoint import load_checkpoint
from ..loaders.diffusion import load_diffusion_model
from ..loaders.folders import all_there, embedding_folders, find_file
from . import legacy_gguf, legacy_nf4
from .shown import loaded

CATEGORY = "Featherweight/legacy"
HELP = "LegacyLoaders"


def load_dtype_input():
    return io.Combo.Input("load_dtype", options=["default", "float8_e4m3fn", "float8_e5m2"], default="float8_e4m3fn",
                          optional=True, tooltip="Kept for old workflows. Weights are packed from the file's own values.")


class CheckpointLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SP_CheckpointLoaderBNB",
            display_name="SP_CheckpointLoaderBNB",
            category=CATEGORY,
            description="A checkpoint loader of NF4 workflows. Same as Load Checkpoint (Featherweight) with pack to NF4.",
            search_aliases=["nf4", "bitsandbytes", "bnb"],
            inputs=[legacy_nf4.checkpoint_input(), load_dtype_input()],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None):
        return all_there(ckpt_name, keys=legacy_nf4.CHECKPOINT_FOLDERS)

    @classmethod
    def load_checkpoint(cls, ckpt_name, load_dtype="default") -> tuple:
        path = find_file(ckpt_name, *legacy_nf4.CHECKPOINT_FOLDERS)
        model, clip, vae = load_checkpoint(path, embedding_folders(), pack_to="NF4")
        return loaded(model=model, clip=clip, vae=vae)

    FUNCTION, execute = "load_checkpoint", load_checkpoint


class UnetLoader(io.ComfyNode):
    HELP_PAGE = HELP

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SP_UnetLoaderBNB",
            display_name="SP_UnetLoaderBNB",
            category=CATEGORY,
            description="A model loader of NF4 workflows. Same as Load Diffusion Model (Featherweight) with pack to NF4.",
            search_aliases=["nf4", "bitsandbytes", "bnb"],
            inputs=[legacy_gguf.model_name_input(), load_dtype_input()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return all_there(unet_name, keys=legacy_gguf.FOLDERS)

    @classmethod
    def load_checkpoint(cls, unet_name, load_dtype="default") -> tuple:
        return loaded(model=load_diffusion_model(find_file(unet_name, *legacy_gguf.FOLDERS), pack_to="NF4"))

    FUNCTION, execute = "load_checkpoint", load_checkpoint  # so it is called there
