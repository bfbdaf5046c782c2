"""GGUF adapters (`general.type = adapter`), as llama.cpp writes them: `<tensor>.lora_a` and
`.lora_b` beside one alpha."""
import re

import gguf
import torch

from ...ops import product
from ...ops.packed_layout import is_packed
from ..files import open_weights
from ..files.container import WeightFileError, safe_repr

PAIR = re.compile(r"^(?P<layer>.+?)(\.weight)?\.lora_(?P<half>[aAbB])(\.weight)?$")
KNOWN_PREFIX = re.compile(r"^(diffusion_model|transformer|unet|lora_|text_encoder|base_model)")


def read_gguf_adapter(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(name -> float32 tensor, metadata) with names as the host reads them. Raises
    WeightFileError."""
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
    spelling = _text_encoder_names(file, layers)
    tensors, state_dict = file.state_dict(), {}
    for name, match in pairs.items():
        layer = spelling.get(match["layer"], match["layer"])
        if not KNOWN_PREFIX.match(layer):
            layer = f"diffusion_model.{layer.removeprefix('model.diffusion_model.')}"
        tensor = tensors[name]  # copied, so that patches lie in no mapped file
        value = (
            product.dequantize(tensor, torch.float32)
            if is_packed(tensor)
            else tensor.to(torch.float32, copy=True)
        )
        state_dict[f"{layer}.lora_{match['half'].upper()}.weight"] = value
        if alpha:  # llama.cpp 0.5.0 (src/llama-adapter.h, get_scale) takes 0 for none
            state_dict[f"{layer}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    return state_dict, {
        key: value for key, value in file.metadata.items() if isinstance(value, str)
    }


def _text_encoder_names(file, layers: set[str]) -> dict[str, str]:
    """llama.cpp's layer name -> the one of the text encoder's own library, by the table of the
    `gguf` package."""
    blocks = [
        int(found[1]) for layer in layers if (found := re.match(r"(?:enc\.)?blk\.(\d+)\.", layer))
    ]
    if not blocks:
        return {}
    architecture = str(file.metadata.get("general.architecture", ""))
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    # llama.cpp permutes the rows of q and k of these, by a number of heads that an adapter does not
    # hold.
    if known is None or architecture == "llama":
        raise WeightFileError(
            f"{file.path.name} is a LoRA for a text encoder of kind"
            f" {safe_repr(architecture or 'unnamed')}, which is not supported as GGUF. Get it as"
            " safetensors.")
    names = {}
    for name, (_, short) in gguf.get_tensor_name_map(known, max(blocks) + 1).mapping.items():
        if re.match(r"model\.layers\.|encoder\.block\.", name):
            names.setdefault(short, f"text_encoders.transformer.{name}")
    return names
