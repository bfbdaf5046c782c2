"""Reads LoRAs in GGUF files: llama.cpp's adapters (`<tensor>.lora_a`, `.lora_b` and one alpha for
all), stable-diffusion.cpp's (`lora.<tensor>.lora_up`, `.lora_down`), and tensors under the names of
any safetensors LoRA."""
import re
from collections.abc import Iterable

import gguf
import torch

from ...ops.layers import product
from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import WeightFile, WeightFileError, safe_repr
from ..files.open_weights import open_weights
from .tensor_names import layer_names

HALF = re.compile(r"(?:\.weight)?\.lora_([aAbB]|up|down|mid)(?:\.weight)?$")


def read_gguf_adapter(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads every tensor of a LoRA in GGUF.

    Returns:
        (name -> tensor, float32 where it was packed or of floats; metadata), with names as in
        safetensors.

    Raises:
        WeightFileError: if the file holds no LoRA or is damaged.
    """
    file = open_weights(path)
    names = {name: HALF.sub(_safetensors_half, name) for name in file.entries}
    stems = layer_names(names.values())
    if not stems:
        declared = file.declared_type
        what = f"a GGUF file of type {safe_repr(declared)}" if declared else "a GGUF model"
        raise WeightFileError(
            f"{file.path.name} is {what} without a LoRA in it (its first tensor is"
            f" {safe_repr(next(iter(file.entries), 'none'))}). Pick it in a model or text encoder"
            " loader."
        )
    alpha = file.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, (int, float, type(None))):
        raise WeightFileError(
            f"{file.path.name} has the alpha {safe_repr(alpha)}, expected a number."
            " Download it again, or report it where you got it.")
    encoder_names = _text_encoder_names(file, stems)
    renamed = {
        stem + end: encoder_names.get(stem, stem) + end
        for stem, ends in stems.items() for end in ends
    }
    state_dict = {
        renamed.get(names[name], names[name]): _dense(tensor)
        for name, tensor in file.state_dict().items()
    }
    if alpha:  # llama.cpp 0.5.0 (src/llama-adapter.h, get_scale) takes 0 for none
        for name in [name for name in state_dict if name.endswith(".lora_B.weight")]:
            state_dict.setdefault(f"{name.removesuffix('.lora_B.weight')}.alpha",
                                  torch.tensor(float(alpha), dtype=torch.float32))
    return state_dict, file.text_metadata


def _safetensors_half(match: re.Match) -> str:
    half = match[1]
    return f".lora_{half.upper() if len(half) == 1 else half}.weight"


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor, since a patch must not keep the file mapped."""
    if is_packed(tensor):
        return product.dequantize(tensor, torch.float32)
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _text_encoder_names(file: WeightFile, layers: Iterable[str]) -> dict[str, str]:
    """Returns llama.cpp's layer name -> name in transformers, by the table of the `gguf` package.
    """
    matches = (re.match(r"(?:enc\.)?blk\.(\d+)\.", layer) for layer in layers)
    blocks = [int(match[1]) for match in matches if match]
    if not blocks:
        return {}
    architecture = str(file.metadata.get("general.architecture", ""))
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    # For llama, llama.cpp permutes the rows of q and k by the number of heads, which an adapter
    # does not have.
    if arch is None or architecture == "llama":
        raise WeightFileError(
            f"{file.path.name} is a LoRA for a text encoder of architecture"
            f" {safe_repr(architecture or 'unnamed')}, which is not supported as GGUF. Get it as"
            " safetensors.")
    names = {}
    for name, (_, short) in gguf.get_tensor_name_map(arch, max(blocks) + 1).mapping.items():
        if re.match(r"model\.layers\.|encoder\.block\.", name):
            names.setdefault(short, f"text_encoders.transformer.{name}")
    return names
