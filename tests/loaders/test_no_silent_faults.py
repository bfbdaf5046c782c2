"""A file with one tensor, mark or setting dropped, doubled, renamed, of another type, cut or added:
what loads has the right values, or the node says what is amiss, or the load stops."""
import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from controlnets import flux_bfl
from encoders import ENCODERS
from encoders.encoder import random_weights, small_towers
from host_formats import HOST_FORMATS
from packed_files import PACKED_FILES, write_host_format
from patched_models import relative, tiny_flux
from quantizer_models import QUANTIZED_MODELS, write_quantized_flux
from safetensors import safe_open
from safetensors.torch import save_file

from devtools.files import demo_files
from devtools.files.gguf_files import write_all
from featherweight.loaders.controlnet import load_controlnet
from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.load_check import load_notes
from featherweight.loaders.text_encoder import load_text_encoder
from featherweight.loaders.vae import load_vae
from featherweight.ops.packed_layout import QuantizedTensor

pytestmark = pytest.mark.usefixtures("small_models")

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path], Any]
Load = Callable[[str], tuple[torch.nn.Module, ModelPatcher]]
WHOLE = 400
FEW = 12
DEFAULTS = ("packing_format",)  # settings whose absence means something
# TAESD's of later models, which earlier ones are without
OPTIONAL = ("vae_scale", "vae_shift")
# cut, they are those of a model with fewer channels or a narrower encoder
SETS_A_SIZE = re.compile(r"^(img_in|txt_in|x_embedder|context_embedder)\.")


def _written_by(writer: Callable) -> Writer:
    return lambda path: writer(path, tiny_flux())


def diffusion_model(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    patcher = load_diffusion_model(path)
    return patcher.model.diffusion_model, patcher


def text_encoder(path: str) -> tuple[torch.nn.Module, ModelPatcher]:
    clip = load_text_encoder([path], CLIP.clip_type, model_options=CLIP.model_options)
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
            file.unlink()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file,
                  metadata or None)
        if settings:
            self.config.write_text(json.dumps(settings))


def retyped(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.float().to(chance.choice([torch.int32, torch.bool]))
    if tensor.itemsize == 1:
        return tensor.view(chance.choice([torch.int8, torch.uint8, torch.bool,
                                          torch.float8_e4m3fn]))
    return tensor.to(chance.choice([torch.float32, torch.uint8, torch.int64, torch.bool]))


def faults_of(stored: Stored | StoredGGUF, chance: random.Random, count: int) -> Iterator[tuple]:
    """Yields (what was done, tensors, metadata, settings)."""
    names = list(stored.tensors)
    kinds: dict[str, list[str]] = {}
    for name in names:  # so that each kind of part is drawn
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    for _ in range(count):
        name = chance.choice(kinds[chance.choice(list(kinds))])
        tensors, tensor = dict(stored.tensors), stored.tensors[name]
        metadata, settings = dict(stored.metadata), copy.deepcopy(stored.settings)
        kind = chance.choice(["drop", "double", "rename", "retype", "cut", "transpose", "add",
                              "setting"])
        if stored.is_whole(name) and kind in ("retype", "cut", "transpose"):
            continue
        if kind in ("drop", "rename") and name in OPTIONAL:
            continue
        if kind == "drop":
            del tensors[name]
        elif kind == "double":
            tensors[f"{name}.1"] = tensor.clone()
        elif kind == "rename":
            tensors[name[:-1] + "x"] = tensors.pop(name)
        elif kind == "retype":
            tensors[name] = retyped(tensor, chance)
        elif kind == "cut" and tensor.ndim and not SETS_A_SIZE.search(name):
            dim = chance.randrange(tensor.ndim)
            tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] // 2)
        elif kind == "transpose" and tensor.ndim == len(set(tensor.shape)) == 2:
            tensors[name] = tensor.t()
        elif kind == "add":
            layer = name.rpartition(".")[0]
            part = chance.choice(["mystery", "weight_scale_3", "lora.up.weight"])
            tensors[f"{layer}.{part}"] = torch.ones(3)
        elif kind == "setting":
            name = change_a_setting(tensors, metadata, settings, chance)
        yield f"{kind} {name}", tensors, metadata, settings


def change_a_setting(tensors: Tensors, metadata: dict, settings: dict,
                     chance: random.Random) -> str:
    """Changes one number or text of the JSON in a mark, in the metadata or in config.json."""
    marks = [name for name, tensor in tensors.items()
             if tensor.dtype == torch.uint8 and tensor.ndim == 1
             and bytes(tensor.tolist()).startswith(b"{")]
    if marks:
        name = chance.choice(marks)
        text = json.loads(bytes(tensors[name].tolist()))
        done = change_one(text, chance)
        tensors[name] = torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)
        return f"{name}: {done}"
    if metadata:
        name = chance.choice(list(metadata))
        try:
            text = json.loads(metadata[name])
        except ValueError:
            text = None
        if isinstance(text, dict) and text:
            done = change_one(text, chance)
            metadata[name] = json.dumps(text)
            return f"metadata {name}: {done}"
    if "quantization_config" in settings:
        return f"config.json: {change_one(settings['quantization_config'], chance)}"
    return "none"


def change_one(settings: dict, chance: random.Random) -> str:
    key = chance.choice(list(settings))
    value = settings[key]
    if isinstance(value, dict) and value:
        return f"{key}.{change_one(value, chance)}"
    if chance.random() < 0.3 and key not in DEFAULTS:
        del settings[key]
        return f"{key} dropped"
    settings[key] = (not value if isinstance(value, bool) else 2 * value + 1
                     if isinstance(value, int | float) else "other")
    return f"{key} = {settings[key]}"


def weights_of(model: torch.nn.Module) -> Tensors:
    return {name: (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()
            for name, weight in model.named_parameters()}


def check_faults(name: str, seed: int, count: int, tmp_path: Path):
    load, write, file = FILES[name]
    path = tmp_path / file
    try:
        write(path)
    except ValueError as error:
        pytest.skip(f"its writer does not take widths of this model: {error}")
    stored = (StoredGGUF if file.endswith(".gguf") else Stored)(path)
    chance = random.Random(seed)
    model, patcher = load(str(path))
    assert load_notes(patcher) == ()
    values = weights_of(model)
    silent: list[str] = []
    for done, *parts in faults_of(stored, chance, count):
        stored.write(*parts)
        try:
            model, patcher = load(str(path))
        except WeightFileError:
            continue
        except Exception as error:
            silent.append(f"{done}: {type(error).__name__}: {error}")
            continue
        if not load_notes(patcher):
            found = weights_of(model)
            silent += [f"{done}: {key}" for key, value in values.items()
                       if found[key].shape != value.shape
                       or not relative(found[key], value) < 1e-6][:1]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("name", FILES)
def test_a_fault_is_never_silent(name, tmp_path):
    with small_towers(CLIP):
        check_faults(name, random.randrange(1 << 30), FEW, tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("name", FILES)
def test_many_faults_are_never_silent(name, tmp_path):
    with small_towers(CLIP):
        check_faults(name, random.randrange(1 << 30), WHOLE, tmp_path)
