"""Diffusion models: a weight file or folder -> the host's own model, with packed weights."""
import collections
import functools
import logging
import os
import re

import comfy.model_patcher
import comfy.sd
import torch
from safetensors import SafetensorError, safe_open

from ..ops.int8 import multiplies_integers
from ..ops.load_hooks import bare_parameters_unpacked
from ..ops.operations import packed_operations
from ..ops.patcher import adopt
from ..ops.tensor import is_packed, relabelled
from .container import WeightFile, WeightFileError, open_weights
from .diffusers_names import in_the_hosts_names
from .progress import Progress
from .safetensors import QUANT_STATE

log = logging.getLogger(__name__)


# Names that bitsandbytes gives what it stores beside a packed weight; host-readable files have none of them.
BITSANDBYTES = re.compile(r"\.(quant_state\.bitsandbytes__\w+|SCB)$")
BITSANDBYTES_PART = re.compile(r"\.((nested_)?absmax|(nested_)?quant_map|quant_state\.\w+)$")


def is_ours(path: str) -> bool:
    """Whether a file is for our reader: GGUF, a folder, or safetensors with weights that bitsandbytes packed.

    Everything else is for the host's own loaders. A damaged safetensors file is ours, because our reader says what is wrong.
    """
    name = str(path).lower()
    if name.endswith(".gguf") or os.path.isdir(path):
        return True
    if not name.endswith((".safetensors", ".sft")):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return any(BITSANDBYTES.search(key) for key in file.keys())
    except (SafetensorError, OSError):
        return True


def load_diffusion_model(path: str, value_dtype: torch.dtype | None = None, patch_dtype: torch.dtype | None = None,
                         compute: str = "exact", disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Load a diffusion model file or folder with its packed weights kept packed.

    value_dtype, patch_dtype, compute: see `PackedLayer`. disable_dynamic: keep the model out of dynamic VRAM. Of a whole
    checkpoint only the model is used. Files without packed weights go to the host's own loader. Raises WeightFileError.
    """
    if not is_ours(path):
        patcher = comfy.sd.load_diffusion_model(path, disable_dynamic=disable_dynamic)
        return keep_choice(patcher, disable_dynamic)
    file = open_weights(path)
    refuse_other_kinds(file)
    progress = Progress(stages=2)
    state_dict = in_the_hosts_names(fix_keys(file.state_dict(progress.each)))
    patcher = model_of(file, state_dict, value_dtype, patch_dtype, compute, disable_dynamic)
    progress.stage()
    patcher.cached_patcher_init = (load_diffusion_model, (path, value_dtype, patch_dtype, compute))
    return keep_choice(patcher, disable_dynamic)


def keep_choice(patcher: comfy.model_patcher.ModelPatcher, disable_dynamic: bool) -> comfy.model_patcher.ModelPatcher:
    """Have a model that is kept out of dynamic VRAM stay out of it where the host loads it once more, for another device.

    The host passes `disable_dynamic` by name where it asks for that itself.
    """
    if disable_dynamic:
        function, *rest = patcher.cached_patcher_init
        patcher.cached_patcher_init = (functools.partial(function, disable_dynamic=True), *rest)
    return patcher


def model_of(file: WeightFile, state_dict: dict[str, torch.Tensor], value_dtype: torch.dtype | None = None,
             patch_dtype: torch.dtype | None = None, compute: str = "exact",
             disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The diffusion model among the weights of a file. Raises WeightFileError when there is none."""
    options = {"custom_operations": operations_for(state_dict, value_dtype, patch_dtype, compute=compute)}
    with bare_parameters_unpacked():
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, model_options=options, metadata=text_metadata(file), disable_dynamic=disable_dynamic)
    if patcher is None:
        raise WeightFileError(
            f"{os.path.basename(file.path)} holds no diffusion model that this ComfyUI knows"
            f" (architecture {file.metadata.get('general.architecture', 'not named')!r}, {len(file.entries)} tensors, first"
            f" {next(iter(file.entries), 'none')!r}). Update ComfyUI if the model is new, or pick another file.")
    adopt(patcher)
    log.info("[Featherweight] %s", report(file, patcher))
    warn_of_exact_products(patcher, compute)
    return patcher


def warn_of_exact_products(patcher: comfy.model_patcher.ModelPatcher, compute: str):
    """One line in the log where int8 products were asked for and the model's device has none."""
    if compute == "int8" and not multiplies_integers(patcher.load_device):
        log.warning("[Featherweight] compute is int8, for which %s has no units that this pack uses (NVIDIA from Turing on, and"
                    " CPUs with VNNI or AMX, have them). The model computes as with exact.", patcher.load_device)


def operations_for(state_dict: dict[str, torch.Tensor], value_dtype: torch.dtype | None = None,
                   patch_dtype: torch.dtype | None = None, full_precision: bool = False, compute: str = "exact") -> type:
    """The operations for these weights, which may include layers in the host's own quantised formats (`full_precision`)."""
    mixed = any(name.endswith(".comfy_quant") for name in state_dict)
    return packed_operations(value_dtype, patch_dtype, mixed, full_precision, compute)


def text_metadata(file: WeightFile) -> dict[str, str]:
    """What the host takes as a file's metadata."""
    return {key: value for key, value in file.metadata.items() if isinstance(value, str)}


def report(file: WeightFile, patcher: comfy.model_patcher.ModelPatcher) -> str:
    """One line for the log: what the file holds, its size, and the bytes its weights take in memory."""
    formats = collections.Counter(formats_in(file).values())
    counts = ", ".join(f"{name} {count}" for name, count in formats.most_common())
    return (f"{os.path.basename(file.path)}: {formats.total()} tensors ({counts}), {file.tensor_bytes} bytes on disk,"
            f" {patcher.model_size()} bytes held")


def formats_in(file: WeightFile) -> dict[str, str]:
    """Name of each weight -> its format. What bitsandbytes keeps in several tensors is one weight."""
    states = filter(None, map(QUANT_STATE.fullmatch, file.entries))
    packed = {found["weight"]: found["quant_type"].upper() for found in states}
    return {name: packed.get(name, entry.format) for name, entry in file.entries.items()
            if BITSANDBYTES_PART.sub("", name) not in packed or name in packed}


# What tells other kinds of files from a diffusion model: a tensor name, what the file is, and what to do with it.
OTHER_KINDS = (
    (r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|^text_model\.embeddings\.|^(model|encoder)\.embed_tokens\.",
     "a text encoder", "Pick it in Load Text Encoder (Featherweight)."),
    (r"^(v\.blk|mm)\.", "the vision part (mmproj) of a text encoder",
     "Pick it in Load Text Encoder (Featherweight), under mmproj."),
    (r"\.lora_(a|b|A|B|up|down)(\.weight)?$", "a LoRA", "Load a model here and put the LoRA in a LoRA loader behind it."),
)


def refuse_other_kinds(file: WeightFile):
    """Raise WeightFileError for a text encoder, mmproj or LoRA picked as a diffusion model."""
    for pattern, kind, advice in OTHER_KINDS:
        found = next((name for name in file.entries if re.search(pattern, name)), None)
        if found is not None:
            raise WeightFileError(
                f"{os.path.basename(file.path)} is {kind} (it has {found!r}), expected a diffusion model. {advice}")


def fix_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo what converters changed in names and shapes that the host's detection reads."""
    for name, tensor in list(state_dict.items()):
        # Some conversions name the scale of a query or key norm `.scale` where the host wants `.weight`.
        if re.search(r"(query|key|_q|_k|\.q|\.k)_norm\.scale$", name):
            state_dict[name.removesuffix("scale") + "weight"] = state_dict.pop(name)
        # stable-diffusion.cpp keeps SDXL's and SD2's linear projections as 1x1 convolutions; only SD1 has those.
        elif re.search(r"\.proj_(in|out)\.weight$", name) and tensor.shape[2:] == (1, 1):
            context = state_dict.get(re.sub(r"proj_(in|out)\.weight$", "transformer_blocks.0.attn2.to_k.weight", name))
            if context is not None and context.shape[1] != 768:
                state_dict[name] = _reshaped(tensor, tensor.shape[:2])
        # It also folds the first two of five dimensions of the video models' first convolution into one.
        elif re.search(r"(patch_embedding\w*|img_in(\.proj)?)\.weight$", name) and tensor.ndim == 4:
            bias = state_dict.get(name.removesuffix("weight") + "bias")
            if bias is not None and tensor.shape[0] > bias.shape[0] and tensor.shape[0] % bias.shape[0] == 0:
                state_dict[name] = _reshaped(tensor, (bias.shape[0], tensor.shape[0] // bias.shape[0], *tensor.shape[1:]))
    return state_dict


def _reshaped(tensor: torch.Tensor, shape) -> torch.Tensor:
    return relabelled(tensor, shape=shape) if is_packed(tensor) else tensor.reshape(shape)
