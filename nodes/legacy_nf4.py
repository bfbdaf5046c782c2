"""Node ids of the NF4 loader packs, with the same inputs in the same order, so that shared workflows open and run.

They are called as Python too, see `legacy_gguf`.
"""
from comfy_api.latest import io

from ..loaders.checkpoint import load_checkpoint
from ..loaders.diffusion import load_diffusion_model
from ..loaders.folders import all_there, embedding_folders, find_file, list_files, list_model_folders
from .shown import loaded

CHECKPOINT_FOLDERS = ("checkpoints_gguf", "checkpoints")
MODEL_FOLDERS = ("unet_gguf", "diffusion_models")
CATEGORY = "Featherweight/legacy"


def checkpoint_input():
    return io.Combo.Input("ckpt_name", options=list_files(*CHECKPOINT_FOLDERS), tooltip="A file in models/checkpoints.")


def bnb_dtype_input():
    return io.Combo.Input("bnb_dtype", options=["default", "nf4", "fp4"], default="default", optional=True,
                          tooltip="Kept for old workflows. The file says which format its weights have.")


class CheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CheckpointLoaderNF4",
            display_name="Load NF4 Checkpoint",
            category=CATEGORY,
            description="The checkpoint loader of NF4 workflows. Same as Load Checkpoint (Featherweight).",
            search_aliases=["nf4", "fp4", "bitsandbytes", "bnb"],
            inputs=[
                checkpoint_input(),
                bnb_dtype_input(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None):
        return all_there(ckpt_name, keys=CHECKPOINT_FOLDERS)

    @classmethod
    def load_checkpoint(cls, ckpt_name, bnb_dtype="default") -> tuple:
        model, clip, vae = load_checkpoint(find_file(ckpt_name, *CHECKPOINT_FOLDERS), embedding_folders())
        return loaded(model=model, clip=clip, vae=vae)

    FUNCTION, execute = "load_checkpoint", load_checkpoint


class UnetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="UNETLoaderNF4",
            display_name="Load NF4 UNet",
            category=CATEGORY,
            description="The model loader of NF4 workflows. Same as Load Diffusion Model (Featherweight).",
            search_aliases=["nf4", "fp4", "bitsandbytes", "bnb"],
            inputs=[
                io.Combo.Input("unet_name", options=[*list_files(*MODEL_FOLDERS), *list_model_folders(*MODEL_FOLDERS)],
                               tooltip="A file in models/diffusion_models or models/unet."),
                bnb_dtype_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, unet_name=None):
        return all_there(unet_name, keys=MODEL_FOLDERS)

    @classmethod
    def load_unet(cls, unet_name, bnb_dtype="default") -> tuple:
        return loaded(model=load_diffusion_model(find_file(unet_name, *MODEL_FOLDERS)))

    FUNCTION, execute = "load_unet", load_unet
