"""Node ids of the NF4 loader packs.

Those of bananasss00's pack, SP_..., pack the weights of files that are not packed yet to NF4.
"""
from comfy_api.latest import io

from ...loaders.models.checkpoint import load_checkpoint
from ...loaders.paths.folders import embedding_folders, find_file
from . import make_nodes
from .inputs import CHECKPOINT_FOLDERS
from .loaders import Loader, ModelLoader


def load_parts(ckpt_name: str, **options) -> dict:
    """Loads the parts of a file in `CHECKPOINT_FOLDERS`, by the keys of `node_text.TITLES`.

    options: further arguments of `load_checkpoint`.
    """
    path = find_file(ckpt_name, *CHECKPOINT_FOLDERS)
    return dict(
        zip(("model", "clip", "vae"), load_checkpoint(path, embedding_folders(), **options))
    )


class CheckpointLoader(Loader):
    """Loads a checkpoint."""

    outputs = (io.Model.Output, io.Clip.Output, io.Vae.Output)

    @classmethod
    def load(cls, name, device) -> dict:
        return load_parts(name, device=device, pack_to=cls.pack_to)


class PackingCheckpointLoader(CheckpointLoader):
    """Loads a checkpoint and packs its diffusion model to NF4."""

    HELP_PAGE = "LegacyLoaders"
    pack_to = "NF4"


class PackingModelLoader(ModelLoader):
    """Loads a diffusion model and packs it to NF4."""

    HELP_PAGE = "LegacyLoaders"
    pack_to = "NF4"


# id: (base class, method, title, inputs, description)
NODE_CONFIG = {
    "CheckpointLoaderNF4": (
        CheckpointLoader, "load_checkpoint", "Load NF4 Checkpoint", "ckpt_name bnb_dtype",
        "The checkpoint loader of NF4 workflows. Same as Load Checkpoint (GGUF, Featherweight).",
    ),
    "UNETLoaderNF4": (
        ModelLoader, "load_unet", "Load NF4 UNet", "unet_name:folders bnb_dtype",
        "The model loader of NF4 workflows. Same as Load Diffusion Model (GGUF, Featherweight).",
    ),
    "SP_CheckpointLoaderBNB": (
        PackingCheckpointLoader, "load_checkpoint", "SP_CheckpointLoaderBNB",
        "ckpt_name load_dtype",
        "A checkpoint loader of NF4 workflows. Same as Load Checkpoint (GGUF, Featherweight)"
        " with pack to set to NF4.",
    ),
    "SP_UnetLoaderBNB": (
        PackingModelLoader, "load_checkpoint", "SP_UnetLoaderBNB", "unet_name load_dtype",
        "A model loader of NF4 workflows. Same as Load Diffusion Model (GGUF, Featherweight) with"
        " pack to set to NF4.",
    ),
}
NODE_CLASS_MAPPINGS = make_nodes(__name__, NODE_CONFIG)
