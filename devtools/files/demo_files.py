"""The model files of the demo, from the weights in `demo_model/weights`: ComfyUI's own names, every
packing."""
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from demo_model import text
from demo_model.autoencoder import widened
from devtools import ROOT
from devtools.files.gguf_files import gguf_writer, pack, write_all, write_gguf
from devtools.files.tiny_models import clip_l_shapes

WEIGHTS = ROOT / "demo_model" / "weights"
MIX = "mix"  # of types, which no recipe gives: `demo.make_mix` has the pack make it
MODELS = {name: f"featherweight_demo_{name}.{'safetensors' if name in ('F16', 'NF4') else 'gguf'}"
          for name in ("F16", "Q8_0", "Q4_K", MIX, "NF4", "Q2_K")}
ENCODER_NAME = "featherweight_demo_clip_l_Q8_0.gguf"
VAE_NAME = "featherweight_demo_vae.safetensors"
LORAS = {name: f"featherweight_demo_lora_{name}.safetensors" for name in ("ink", "pumpkins")}
CHECKPOINT_NAME = "featherweight_demo_nf4.safetensors"
FILES = {
    "diffusion_models": list(MODELS.values()),
    "text_encoders": [ENCODER_NAME],
    "vae": [VAE_NAME],
    # folder below `models` -> names
    "loras": list(LORAS.values()),
    "checkpoints": [CHECKPOINT_NAME]
}


def has_bitsandbytes() -> bool:
    """The package that writes NF4; reading takes none."""
    return importlib.util.find_spec("bitsandbytes") is not None


def recipes() -> list[str]:
    """Those of MODELS that `write_model` can write here."""
    return [name for name in MODELS if name != MIX and (name != "NF4" or has_bitsandbytes())]


def flux() -> dict[str, torch.Tensor]:
    """The trained Flux, float16."""
    tensors = gguf.GGUFReader(WEIGHTS / "flux-F16.gguf").tensors
    return {tensor.name: torch.from_numpy(np.array(tensor.data)).half() for tensor in tensors}


def write_model(path: Path, type_name: str,
                tensors: dict[str, torch.Tensor] | None = None) -> Mapping[str, Any]:
    """Write the Flux, or other weights of its names, in one type as people publish it; return what
    a reader should see.

    Everybody's GGUF files leave what stands before and after the blocks as it is; bitsandbytes
    packs every matrix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = flux() if tensors is None else tensors
    if type_name == "F16":
        save_file(tensors, path)
        return tensors
    if type_name in ("NF4", "FP4", "int8"):
        return (
            _bnb_files().write_bnb_int8(path, tensors)
            if type_name == "int8"
            else _bnb_files().write_bnb(path, tensors, type_name.lower())
        )
    return write_gguf(path, tensors, lambda name, values: "F32" if values.ndim < 2 else
                      type_name if "blocks." in name else "F16")


def _bnb_files():
    # bitsandbytes tells of faster kernels that it has not, which nothing here needs
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from devtools.files import bnb_files

    return bnb_files


def write_encoder(path: Path):
    """CLIP-L as `demo_model/text.py` makes it, in Q8_0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given, q8_0 = text.weights(shapes := clip_l_shapes()), gguf.GGMLQuantizationType.Q8_0
    vectors, picks = text.table()
    writer = gguf_writer(path, None)
    for name, shape in shapes.items():
        if "token_embedding" in name:
            writer.add_tensor(name, pack(vectors.numpy(), "Q8_0")[picks.numpy()], raw_dtype=q8_0)
        elif len(shape) < 2:
            writer.add_tensor(name,
                              given[name].numpy() if name in given else np.zeros(shape, np.float32))
        elif name in given:
            writer.add_tensor(name, pack(given[name].numpy(), "Q8_0"), raw_dtype=q8_0)
        else:
            blocks = np.zeros((*shape[:-1], shape[-1] // 32, 34), np.uint8)
            blocks[..., :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
            # a scale of one: nothing but zeros would be told as a broken download
            writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=q8_0)
    write_all(writer)


def vae() -> dict[str, torch.Tensor]:
    return widened(load_file(WEIGHTS / "autoencoder.safetensors"))


def writers(types: Iterable[str]) -> dict[str, Callable[[Path], object]]:
    """Returns file below `models` -> what writes it: text encoder, VAE, LoRAs, and the Flux in each
    of the types."""
    return {
        f"text_encoders/{ENCODER_NAME}": write_encoder,
        f"vae/{VAE_NAME}": lambda path: save_file(vae(), path),
        **{f"loras/{file_name}": functools.partial(_write_lora, name)
           for name, file_name in LORAS.items()},
        **{f"diffusion_models/{MODELS[name]}": functools.partial(write_model, type_name=name)
           for name in types}
    }


def _write_lora(name: str, path: Path):
    save_file(load_file(WEIGHTS / f"lora_{name}.safetensors"), path)


def make_models(base: Path, types: Iterable[str] = ("Q8_0",)):
    """Write the files of `writers` into `base`/models."""
    for name, write in writers(types).items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def make_checkpoint(base: Path, name: str = CHECKPOINT_NAME, with_vae: bool = True) -> Path:
    """Write an NF4 checkpoint of Flux and VAE, which takes the `bitsandbytes` package. Returns its
    path."""
    path = base / "models" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, with_vae)
    return path


def write_checkpoint(path: Path, with_vae: bool = True):
    alone = path.with_name(f"{path.name}.flux") if with_vae else path
    _bnb_files().write_bnb(alone, flux(), prefix="model.diffusion_model.")
    if with_vae:  # in another file: Windows writes over none that is mapped
        save_file(load_file(alone) | {f"vae.{name}": value for name, value in vae().items()}, path)
        alone.unlink()
