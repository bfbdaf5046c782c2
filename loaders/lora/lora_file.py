"""Reads LoRA files and finds damaged layers."""
import re

import comfy.utils
import torch
from safetensors import SafetensorError

from ..container.weight_file import WeightFileError, first_line, map_file, safe_repr
from ..files.torch_file import read_torch_file
from ..out_of_memory import is_out_of_memory
from ..refusals.wrong_format import LFS_POINTER
from .family_match import match_family
from .gguf_adapter import read_gguf_adapter
from .header_alpha import read_config
from .tensor_names import PARTNER, PRODUCTS, SIDES, layer_names

# Tensor names of other files that people pick by mistake, what such a file is, and how to load it.
OTHER_FILES = (
    (
        r"^(control_model|controlnet_|input_hint_block|zero_convs)",
        "a ControlNet",
        "Load it with Load ControlNet Model.",
    ),
    (
        r"^(emb_params|string_to_param|clip_[lg]$|bundle_emb\.)",
        "an embedding (textual inversion)",
        "Put it into models/embeddings and write embedding:its-name into the prompt.",
    ),
    (
        r"^(model\.diffusion_model|cond_stage_model|conditioner)\.",
        "a checkpoint",
        "Load it with a checkpoint loader.",
    ),
    (
        r"text_model\.encoder\.|^encoder\.block\.\d+\.layer\.|^model\.layers\.\d+\.self_attn"
        r"|^(enc\.)?blk\.\d|^token_embd",
        "a text encoder",
        "Load it with a text encoder loader (CLIP).",
    ),
    (
        r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|mid)",
        "a VAE",
        "Load it with Load VAE.",
    ),
)
# Adapters that are no LoRAs, by what PEFT 0.21, LyCORIS 4.1 and OneTrainer call their tensors.
OTHER_ADAPTERS = {
    "ia3": "IA3", "on_input": "IA3", "lambda_layer": "T-LoRA", "oft": "OFT2 (OFT of PEFT)",
    "boft": "BOFT of PEFT", "vera": "VeRA", "pvera": "PVeRA", "hra": "HRA", "miss": "MiSS",
    "bone": "Bone (MiSS)", "delora": "DeLoRA", "gralora": "GraLoRA", "randlora": "RandLora",
    "fourierft": "FourierFT", "waveft": "WaveFT", "shira": "SHiRA", "c3a": "C3A", "road": "RoAd",
    "hira": "HiRA", "vblora": "VB-LoRA", "tinylora": "TinyLoRA", "unilora": "Uni-LoRA",
    "glora": "GLoRA of PEFT", "poly": "Poly", "lily": "Lily", "psoft": "PSOFT", "deft": "DEFT",
    "adamss": "AdaMSS", "beft": "BEFT", "frod": "FRoD", "peanut": "PEANuT", "osf": "OSF",
    "supertuning": "SuperTuning", "shadow": "Shadow", "ln_tuning": "LN tuning",
    "trainable_tokens": "trainable tokens", "adaption": "adaption prompt",
}
OTHER_ADAPTER = re.compile(
    rf"(?:^|\.)(?:(on_input|lambda_layer)$|({'|'.join(OTHER_ADAPTERS)})_(?!blocks)\w+(?:\.|$))")
# what the readers of safetensors raise for other bytes
UNREADABLE = (ValueError, TypeError, RuntimeError, OSError, EOFError, KeyError, SafetensorError)


def load_lora_file(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a LoRA file: safetensors as the host does, torch files, and GGUF adapters.

    A file with some damaged layers is returned as it is; `check_lora` names them.

    Returns:
        (name -> tensor, metadata, with PEFT's config as of `read_config`); GGUF's tensors are
        dequantised to float32.

    Raises:
        WeightFileError: if the file is not a LoRA or has no undamaged layer.
    """
    head = bytes(map_file(path)[:512])
    name = re.split(r"[\\/]", str(path))[-1]
    if head.startswith(b"GGUF"):
        state_dict, metadata = read_gguf_adapter(path)
    elif not str(path).lower().endswith((".safetensors", ".sft")):
        state_dict, metadata = read_torch_file(path), {}
    else:
        try:
            state_dict, metadata = comfy.utils.load_torch_file(str(path), safe_load=True,
                                                               return_metadata=True)
        except UNREADABLE as error:
            if is_out_of_memory(error):
                raise
            raise WeightFileError(
                f"{name} cannot be read as a LoRA: {_unreadable(head, error)}") from error
    state_dict = {
        key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)
    }
    stems = layer_names(state_dict)
    if not stems:
        raise WeightFileError(f"{name} {_not_a_lora(state_dict)}")
    damaged = damaged_layers(stems, state_dict)
    if len(damaged) == len(stems):
        stem, reason = next(iter(damaged.items()))
        others = f", and all {len(stems)} layers are damaged" if len(stems) > 1 else ""
        raise WeightFileError(
            f"{name} has no layer that can be used: {safe_repr(stem)} has {reason}{others}."
            " Download it again, or report it where you got it.")
    return state_dict, dict(metadata or {}) | read_config(path)


WHOLE_NUMBERS = (".alpha", ".reshape_weight")  # parts of a layer that may be integers


def damaged_layers(stems: dict[str, set[str]],
                   state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """Returns layer -> damage, for layers that no model could use.

    Args:
        stems: from `layer_names`.
        state_dict: of the file.
    """
    damages = {
        stem: _damage(stem, {end: state_dict[stem + end] for end in ends})
        for stem, ends in stems.items()
    }
    return {stem: damage for stem, damage in damages.items() if damage is not None}


def _damage(stem: str, tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns what a layer has in place of usable factors, or None.

    Args:
        stem: name of the layer.
        tensors: of the layer, by their name endings.
    """
    missing = next((PARTNER[end] for end in tensors
                    if end in PARTNER and PARTNER[end] not in tensors), None)
    if missing is None:
        missing = next((second if first in tensors else first for first, second in SIDES
                        if (first in tensors) != (second in tensors)), None)
    if missing is not None:
        return f"half a pair ({safe_repr(stem + missing)} is missing from the file)"
    values = [tensor for end, tensor in tensors.items() if end != ".reshape_weight"]
    if any(0 in tensor.shape for tensor in values):
        return "rank 0"
    if ".alpha" in tensors and tensors[".alpha"].numel() != 1:
        return f"an alpha of {tensors['.alpha'].numel()} numbers"
    whole = next((end for end, tensor in tensors.items() if (end not in WHOLE_NUMBERS and not (
        tensor.is_floating_point())) or tensor.dtype == torch.bool), None)
    if whole is not None:
        return f"integers in {safe_repr(stem + whole)}, where floats are expected"
    if not all(torch.isfinite(tensor.float()).all() for tensor in values
               if tensor.is_floating_point()):
        return "NaN or infinite values"
    for up_end, down_end in PRODUCTS:
        if up_end in tensors:
            up, down = tensors[up_end], tensors[down_end]
            if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0]:
                return (f"halves that do not belong together ({list(up.shape)} and"
                        f" {list(down.shape)})")
            return None
    return None


def weight_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Returns name -> (rows, columns) of weights, further dimensions flattened."""
    return {key.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1:].numel())
            for key, tensor in tensors.items() if tensor.ndim > 1}


def _unreadable(head: bytes, error: Exception) -> str:
    if head.startswith(b"version https://git-lfs"):
        return LFS_POINTER
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        return (
            "it is a web page, not the LoRA; the site may want you to log in first. Download the"
            " LoRA itself.")
    return f"the file is damaged or incomplete ({first_line(error)}). Download it again."


def _not_a_lora(state_dict: dict[str, torch.Tensor]) -> str:
    if not state_dict:
        return "holds no tensors, expected a LoRA. Download it again."
    for key in state_dict:
        if match := OTHER_ADAPTER.search(key):
            title = OTHER_ADAPTERS[match[1] or match[2]]
            return (
                f"is an adapter of the kind {title} (it has {safe_repr(key)}), which neither"
                " ComfyUI nor this pack applies. Merge it into its model with the program that"
                " trained it, or get a LoRA.")
    for pattern, title, advice in OTHER_FILES:
        name = next((key for key in state_dict if re.search(pattern, key)), None)
        if name is not None:
            return f"is {title} (it has {safe_repr(name)}), expected a LoRA. {advice}"
    family = match_family(weight_shapes(state_dict))
    if family is not None:
        return (
            f"is a diffusion model ({family}), expected a LoRA. Load it with Load Diffusion"
            " Model.")
    return (
        f"has no LoRA in it ({len(state_dict)} tensors, first"
        f" {safe_repr(next(iter(state_dict)))}), expected pairs such as lora_up and lora_down."
        " Pick another file.")
