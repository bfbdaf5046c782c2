"""Node ids of the NF4 loader packs.

Those of bananasss00's pack, SP_..., pack the weights of files that are not packed yet to NF4.
"""
from comfy_api.latest import io

from ...loaders.models.checkpoint import load_checkpoint
from ...loaders.paths.folders import embedding_folders, find_file, list_files, list_model_folders
from ..node_text import loader_output
from . import LegacyNode, make_nodes
from .gguf import FOLDERS, load_model, model_input

CHECKPOINT_FOLDERS = ("checkpoints_gguf", "checkpoints")


def checkpoint_input():
    """Returns the input for a checkpoint."""
    return io.Combo.Input(
        "ckpt_name",
        options=list_files(*CHECKPOINT_FOLDERS),
        tooltip="A file in models/checkpoints.",
    )


def bnb_dtype_input():
    """Returns an input that old workflows have and that has no effect."""
    return io.Combo.Input(
        "bnb_dtype",
        options=["default", "nf4", "fp4"],
        default="default",
        optional=True,
        tooltip="Kept for old workflows. The file defines the format of its weights.",
    )


def load_dtype_input():
    """Returns an input that old workflows have and that has no effect."""
    return io.Combo.Input(
        "load_dtype",
        options=["default", "float8_e4m3fn", "float8_e5m2"],
        default="float8_e4m3fn",
        optional=True,
        tooltip="Kept for old workflows. Weights are packed from the file's own values.",
    )


def load_parts(ckpt_name: str, **options) -> dict:
    """Loads the parts of a file in `CHECKPOINT_FOLDERS`, by the keys of `node_text.TITLES`.

    options: further arguments of `load_checkpoint`.
    """
    path = find_file(ckpt_name, *CHECKPOINT_FOLDERS)
    return dict(
        zip(("model", "clip", "vae"), load_checkpoint(path, embedding_folders(), **options))
    )


class CheckpointLoader(LegacyNode):
    """Loads a checkpoint."""

    FUNCTION = "load_checkpoint"
    folders = CHECKPOINT_FOLDERS
    outputs = (io.Model.Output, io.Clip.Output, io.Vae.Output)

    @classmethod
    def load_checkpoint(cls, ckpt_name, bnb_dtype="default") -> tuple:
        return loader_output(**load_parts(ckpt_name))


class UnetLoader(LegacyNode):
    """Loads a diffusion model."""

    FUNCTION = "load_unet"
    folders = FOLDERS

    @classmethod
    def load_unet(cls, unet_name, bnb_dtype="default") -> tuple:
        return loader_output(model=load_model(unet_name))


class PackingCheckpointLoader(CheckpointLoader):
    """Loads a checkpoint and packs its diffusion model to NF4."""

    HELP_PAGE = "LegacyLoaders"

    @classmethod
    def load_checkpoint(cls, ckpt_name, load_dtype="default") -> tuple:
        return loader_output(**load_parts(ckpt_name, pack_to="NF4"))


class PackingUnetLoader(LegacyNode):
    """Loads a diffusion model and packs it to NF4."""

    HELP_PAGE = "LegacyLoaders"
    FUNCTION = "load_checkpoint"  # the name in the original pack
    folders = FOLDERS

    @classmethod
    def load_checkpoint(cls, unet_name, load_dtype="default") -> tuple:
        return loader_output(model=load_model(unet_name, pack_to="NF4"))


# id: (base class, title, inputs, description)
NODE_CONFIG = {
    "CheckpointLoaderNF4": (
        CheckpointLoader,
        "Load NF4 Checkpoint",
        lambda: [checkpoint_input(), bnb_dtype_input()],
        "The checkpoint loader of NF4 workflows. Same as Load Checkpoint (Featherweight).",
    ),
    "UNETLoaderNF4": (
        UnetLoader,
        "Load NF4 UNet",
        lambda: [model_input(folders=list_model_folders(*FOLDERS)), bnb_dtype_input()],
        "The model loader of NF4 workflows. Same as Load Diffusion Model (Featherweight).",
    ),
    "SP_CheckpointLoaderBNB": (
        PackingCheckpointLoader,
        "SP_CheckpointLoaderBNB",
        lambda: [checkpoint_input(), load_dtype_input()],
        "A checkpoint loader of NF4 workflows. Same as Load Checkpoint (Featherweight) with pack to"
        " set to NF4.",
    ),
    "SP_UnetLoaderBNB": (
        PackingUnetLoader,
        "SP_UnetLoaderBNB",
        lambda: [model_input(), load_dtype_input()],
        "A model loader of NF4 workflows. Same as Load Diffusion Model (Featherweight) with pack to"
        " set to NF4.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG)
