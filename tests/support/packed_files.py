"""Writers of whole models in each family of packed formats, in the names that the weights have.

Each takes a path and name -> float32 tensor, writes its file or folder there, and returns the
values that a reader must get.
"""
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import comfyui_gguf_style
from host_formats import in_host_format
from pack_api import is_packed, product
from safetensors.torch import load, save_file
from sdnq_writer import write_folder

from devtools.files.gguf_files import write_gguf
from featherweight.ops.formats.comfy_quant import ROTATION


def write_ggml(packed_type: str, path, weights, **options):
    """Matrices in a type of ggml and the rest in F32."""
    seen = write_gguf(path, weights, **comfyui_gguf_style(packed_type), **options)
    return {name: torch.from_numpy(numpy.array(values)).reshape(weights[name].shape)
            for name, values in seen.items()}


def write_bitsandbytes(writer: str, path, weights, **options):
    """Matrices by a writer of `bnb_files`."""
    bnb_files = pytest.importorskip("devtools.files.bnb_files", reason="bitsandbytes writes them")
    return getattr(bnb_files, writer)(path, weights, **options)


def write_host_format(format_name: str, path, weights, **config):
    """Matrices in one of ComfyUI's own formats; `config`: as `in_host_format` takes it. Where it
    has `convrot`, only those whose rows divide into what is rotated."""
    stored, values = {}, {}
    for name, value in weights.items():
        stored[name] = values[name] = value
        is_matrix = value.ndim == 2 and name.endswith(".weight")
        if is_matrix and not (config.get("convrot") and value.shape[1] % ROTATION):
            parts, values[name] = in_host_format(name, value, format_name, **config)
            stored |= parts
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    return values


def write_sdnq(path, weights, **options):
    """Matrices in uint4 with a low rank, in a folder as diffusers saves it."""
    return write_folder(path, weights, group=64, rank=4, is_chosen=lambda name, value: (
        value.ndim == 2 and value.shape[1] % 64 == 0), **options)


write_q8_0 = functools.partial(write_ggml, "Q8_0")

# format -> (writer, name of the file or folder)
PACKED_FILES = {
    "Q8_0": (write_q8_0, "net.gguf"),
    "Q4_K": (functools.partial(write_ggml, "Q4_K"), "net.gguf"),
    "NF4": (functools.partial(write_bitsandbytes, "write_bnb"), "net.safetensors"),
    "int8": (functools.partial(write_bitsandbytes, "write_bnb_int8"), "net.safetensors"),
    **{name: (functools.partial(write_host_format, name), "net.safetensors")
       for name in ("float8_e4m3fn", "int8_tensorwise")},
    "SDNQ": (write_sdnq, "net"),
}
# what divides the rows of matrices that are packed, where it is not 32
WIDTHS = {"Q4_K": 256, "SDNQ": 64}


def in_shards(write: Callable, count: int, config: Mapping[str, Any],
              stem: str = "diffusion_pytorch_model") -> Callable:
    """A writer of a folder as diffusers and transformers save it, of what another one writes; the
    parts of one weight lie in different files too."""
    def written(folder: Path, weights, **options):
        folder.mkdir(parents=True)
        whole, places = folder / f"{stem}.safetensors", {}
        values = write(whole, weights, **options)
        if count > 1:
            stored = load(whole.read_bytes())
            whole.unlink()
            for number in range(count):
                name = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
                keys = list(stored)[number::count]
                save_file({key: stored[key] for key in keys}, folder / name)
                places |= dict.fromkeys(keys, name)
            (folder / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": places}))
        (folder / "config.json").write_text(json.dumps(config))
        return values
    return written


def write_with_dense(writer: Callable, path: Path, weights) -> str:
    """Writes a packed file or folder and dense.safetensors of its values beside it, and returns the
    path of that. writer: as in PACKED_FILES."""
    seen = writer(path, dict(weights))
    dense = {name: torch.as_tensor(value).float().clone().contiguous()
             for name, value in seen.items()}
    save_file(dense, path.parent / "dense.safetensors")
    return str(path.parent / "dense.safetensors")


def write_for_a_loader(path: Path, weights):
    """Writes weights for a loader that is to refuse them: packed where the file is GGUF."""
    if path.suffix == ".gguf":
        write_q8_0(path, weights)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)


def load_values_of(dense: torch.nn.Module, packed: torch.nn.Module):
    """Gives a dense model the values that a packed one computes with."""
    dense.load_state_dict({
        name: product.dequantize(value, torch.float32) if is_packed(value) else value
        for name, value in packed.state_dict().items()
    })
