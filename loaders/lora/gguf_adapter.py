"""Reads GGUF adapters (`general.type = adapter`) as llama.cpp writes them: `<tensor>.lora_a`,
`.lora_b` and one alpha for all."""
import re

import gguf
import torch

from ...ops import product
from ...ops.packed_layout import is_packed
from ..files import open_weights
from ..files.container import WeightFile, WeightFileError, safe_repr

PAIR = re.compile(r"^(?P<layer>.+?)(\.weight)?\.lora_(?P<half>[aAbB])(\.weight)?$")
KNOWN_PREFIX = re.compile(r"^(diffusion_model|transformer|unet|lora_|text_encoder|base_model)")


def read_gguf_adapter(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a GGUF adapter.

    Returns:
        (name -> float32 tensor, metadata), with names that the host reads.

    Raises:
        WeightFileError: if the file is not such an adapter or is damaged.
    """
    file = open_weights(path)
    pairs = {name: match for name in file.entries if (match := PAIR.match(name))}
    if not pairs:
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
    layers = {match["layer"] for match in pairs.values()}
    encoder_names = _text_encoder_names(file, layers)
    tensors = file.state_dict()
    state_dict = {}
    for name, match in pairs.items():
        layer = encoder_names.get(match["layer"], match["layer"])
        if not KNOWN_PREFIX.match(layer):
            layer = f"diffusion_model.{layer.removeprefix('model.diffusion_model.')}"
        tensor = tensors[name]
        value = (
            product.dequantize(tensor, torch.float32)
            if is_packed(tensor)
            else tensor.to(torch.float32, copy=True)  # a patch must not keep the file mapped
        )
        state_dict[f"{layer}.lora_{match['half'].upper()}.weight"] = value
        if alpha:  # llama.cpp 0.5.0 (src/llama-adapter.h, get_scale) takes 0 for none
            state_dict[f"{layer}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    return state_dict, file.text_metadata


def _text_encoder_names(file: WeightFile, layers: set[str]) -> dict[str, str]:
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
