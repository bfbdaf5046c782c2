"""What loaders of other packs do: diffusion models and text encoders, on a device."""
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...loaders.devices import DEFAULT, device_options, find_device
from ...loaders.files.open_weights import open_weights
from ...loaders.models.diffusion import load_diffusion_model
from ...loaders.models.loader_choice import needs_own_reader
from ...loaders.models.text_encoder import load_text_encoder
from ...loaders.paths.folders import embedding_folders, find_file
from ..node_text import loader_output
from . import LegacyNode
from .inputs import CLIP_FOLDERS, FOLDERS

# UNETLoader's weight_dtype: the host's model options
WEIGHT_DTYPES = {
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
}
# There is only one set of three text encoders and one of four, whatever type a caller names.
TYPE_OF_SETS = {3: "sd3", 4: "hidream"}


def load_model(name: str, **options) -> ModelPatcher:
    """Loads a diffusion model.

    Args:
        name: a file or folder in `FOLDERS`.
        options: further arguments of `load_diffusion_model`.
    """
    return load_diffusion_model(find_file(name, *FOLDERS), **options)


def load_clip(clip_type: str, *names: str, device: torch.device | None = None) -> comfy.sd.CLIP:
    """Loads text encoders as one CLIP.

    Args:
        clip_type: an option of the type input.
        names: files in `CLIP_FOLDERS`.
        device: where it runs; None: where the host decides.
    """
    paths = [find_file(name, *CLIP_FOLDERS) for name in names]
    return load_text_encoder(
        paths, clip_type, embedding_folders(), model_options=device_options(device)
    )


class Loader(LegacyNode):
    """Base of the loaders.

    `load` takes the files, a device or None, and inputs by name; it returns the loaded parts by the
    keys of `node_text.TITLES`.
    """

    pack_to: str | None = None

    @classmethod
    def load(cls, *names: str, device: torch.device | None, **inputs) -> dict:
        raise NotImplementedError

    @classmethod
    def run(cls, *names, device=DEFAULT, **inputs) -> tuple:
        found, note = find_device(device)
        return loader_output(note, **cls.load(*names, device=found, **inputs))


class ModelLoader(Loader):
    """Loads a diffusion model."""

    also = "dequant_dtype patch_dtype patch_on_device"  # also of the loader without these inputs

    @classmethod
    def load(cls, name, device, weight_dtype=DEFAULT) -> dict:
        options = device_options(device) | WEIGHT_DTYPES.get(weight_dtype, {})
        return {"model": load_model(name, model_options=options, pack_to=cls.pack_to)}


class TextEncoderLoader(Loader):
    """Loads one to four text encoders.

    Callers use its method, or the two steps `load_data` and `load_patcher`.
    """

    outputs = (io.Clip.Output,)
    also = "type device:encoder"

    @classmethod
    def load(cls, *names, device, type=None) -> dict:
        clip_type = TYPE_OF_SETS.get(len(names), type or "stable_diffusion")
        return {"clip": load_clip(clip_type, *names, device=device)}

    @staticmethod
    def load_data(ckpt_paths) -> list:
        """Returns a state dict of each file, with the file's own keys.

        Packed weights stay packed and are mapped from the file.
        """
        return [
            open_weights(path).state_dict()
            if needs_own_reader(path)
            else comfy.utils.load_torch_file(path, safe_load=True)
            for path in ckpt_paths
        ]

    @staticmethod
    def load_patcher(clip_paths, clip_type: comfy.sd.CLIPType, clip_data=None) -> comfy.sd.CLIP:
        """Loads the text encoders in these files.

        clip_data is not used, because it lacks metadata that is needed to load them.
        """
        return load_text_encoder(list(clip_paths), clip_type.name.lower(), embedding_folders())
