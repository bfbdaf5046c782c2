"""A small file of every family that the loaders read, and what is stored in it, to write it again
with one thing changed."""
import functools
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from controlnets import flux_bfl
from encoders import ENCODERS
from encoders.encoder import load_encoder, random_weights
from host_formats import HOST_FORMATS
from pack_api import QuantizedTensor, load_diffusion_model
from packed_files import PACKED_FILES, write_host_format
from patched_models import folder as kept_models
from patched_models import tiny_flux
from quantizer_models import QUANTIZED_MODELS, write_quantized_flux
from safetensors import safe_open
from safetensors.torch import save_file

from devtools.files import demo_files
from devtools.files.gguf_files import write_all
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.vae import load_vae

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path], Any]
Load = Callable[[str], tuple[torch.nn.Module, ModelPatcher]]


def _written_by(writer: Callable) -> Writer:
    return lambda path: writer(path, tiny_flux())


def diffusion_model(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    patcher = load_diffusion_model(path)
    return patcher.model.diffusion_model, patcher


def text_encoder(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    clip = load_encoder(path, CLIP)
    return clip.cond_stage_model, clip.patcher


def autoencoder(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    vae = load_vae(path)
    return vae.first_stage_model, vae.patcher


def controlnet(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    control = load_controlnet(path)
    return control.control_model, control.control_model_wrapped


def write_plain(path: Path, weights: Tensors):
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


CLIP = ENCODERS["clip-l"]
# family -> (load, writer, name of the file or folder)
FILES: dict[str, tuple[Load, Writer, str]] = {
    **{name: (diffusion_model, _written_by(writer), file)
       for name, (writer, file) in PACKED_FILES.items()},
    **{name: (diffusion_model, _written_by(partial(write_host_format, name)), "net.safetensors")
       for name in HOST_FORMATS},
    **{name: (diffusion_model,
              lambda path, name=name: (path.mkdir(), write_quantized_flux(path, name)), "net")
       for name in QUANTIZED_MODELS},
    "text encoder": (text_encoder, lambda path: write_host_format(
        "int8_tensorwise", path, random_weights(CLIP)), "clip.safetensors"),
    "VAE": (autoencoder, lambda path: write_plain(path, demo_files.vae()), "vae.safetensors"),
    "ControlNet": (controlnet, lambda path: write_host_format("float8_e4m3fn", path, flux_bfl()),
                   "controlnet.safetensors"),
}


def weights_of(model: torch.nn.Module) -> Tensors:
    """The values of a model's weights, packed ones dequantised, in float32."""
    return {name: (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()
            for name, weight in model.named_parameters()}


def stored_in(path: Path) -> "Stored | StoredGGUF":
    """What a file or folder holds."""
    return (StoredGGUF if path.name.endswith(".gguf") else Stored)(path)


def written(family: str, folder: Path) -> tuple[Load, "Stored | StoredGGUF"]:
    """Writes the file of a family; returns how it is loaded, and what it holds.

    Skips the test where the writer does not take the widths of its model.
    """
    load, _, file = FILES[family]
    try:
        kept = _written_once(family)
    except ValueError as error:
        pytest.skip(f"its writer does not take widths of this model: {error}")
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    return load, stored_in(folder / file)


@functools.cache
def _written_once(family: str) -> Path:
    _, write, file = FILES[family]
    kept = Path(kept_models().name, f"stored {family}")
    kept.mkdir(exist_ok=True)  # a writer that skips the test is asked again
    write(kept / file)
    return kept


class StoredGGUF:
    """What a GGUF file has: tensors in F32, and others as bytes."""

    metadata: dict = {}
    settings: dict = {}

    def __init__(self, path: Path):
        self.path = path
        tensors = gguf.GGUFReader(path).tensors
        self.types = {tensor.name: tensor.tensor_type for tensor in tensors}
        self.tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in tensors}

    def write(self, tensors: Tensors, metadata: dict, settings: dict):
        writer = gguf.GGUFWriter(self.path, "flux")
        for name, tensor in tensors.items():
            values = (tensor.int() if tensor.dtype == torch.bool else tensor).contiguous().numpy()
            stored = self.types.get(name.removesuffix(".1"), self.types.get(name[:-1] + "t"))
            writer.add_tensor(name, values, raw_dtype=stored if values.dtype == "uint8" else None)
        write_all(writer)

    def is_whole(self, name: str) -> bool:
        """Whether the tensor is of bytes that only go together."""
        return self.tensors[name].dtype == torch.uint8


class Stored:
    """What a safetensors file, or a folder with one, has: tensors, metadata and settings."""

    def __init__(self, path: Path):
        self.path = path
        self.file = next(path.glob("*.safetensors")) if path.is_dir() else path
        self.config = path / "config.json"
        with safe_open(self.file, "pt") as file:
            self.tensors: Tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            self.metadata = dict(file.metadata() or {})
        self.settings = json.loads(self.config.read_text()) if self.config.exists() else {}

    def is_whole(self, name: str) -> bool:
        return False

    def write(self, tensors: Tensors, metadata: dict, settings: dict):
        for file in self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]:
            file.unlink(missing_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file,
                  metadata or None)
        if settings:
            self.config.write_text(json.dumps(settings))
