"""*fit this GPU*: what is chosen for a device's whole memory, said, and the same when fixed."""
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from encoders.encoder import small_towers
from patched_models import flux_file, folder
from recipe_process import digest
from safetensors.torch import save_file

from devtools.files import tiny_models
from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.inspect.model_summary import memory_summary
from featherweight.loaders.models import fit_device
from featherweight.loaders.models.checkpoint import load_checkpoint
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.fit_device import FIT, fit_text
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.loaders.packing.planning import fit
from featherweight.loaders.packing.planning.fit import GIB, Memory

pytestmark = pytest.mark.usefixtures("small_models")


class Room(Memory):
    """Memory with so many bytes for weights, packed or not."""

    def __new__(cls, nbytes: int, **attributes):
        made = Memory(gib=12, **attributes)
        object.__setattr__(made, "for_model", lambda step_bytes, workspace=0: nbytes)
        object.__setattr__(made, "for_encoder", lambda workspace=0: nbytes)
        return made
