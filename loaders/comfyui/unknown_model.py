"""Says why the host detects no diffusion model in a file."""
import re
from collections.abc import Collection, Iterator, Mapping
from typing import NoReturn

import comfy.model_detection
import comfy.supported_models
import torch

from ...ops.host_versions import HOST_VERSION, is_older
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFile, WeightFileError, safe_repr
from ..refusals.wrong_kind import reject_side_model
from .detection import try_detect
from .diffusers_keys import from_diffusers
from .weight_keys import LONGEST_CUT, model_prefix

# The host's class of a model -> how the advice begins where its file lacks weights.
MISSING_HINTS = {"SeedVR2": "Put SeedVR2's pos_emb.pt and neg_emb.pt next to it, or get"}

# Words in the name, or `general.architecture`, of a published file -> the model, and the first
# ComfyUI that reads it, as its card says; "" where no card does, and ComfyUI 0.33 does not read it.
# No such file was seen here, so that its tensors are not known.
NEWER_MODELS = {
    r"(?<![a-z])p[ ._-]?h3[ ._-]?image": ("P-H3-Image", "0.44"),
    r"minimax[ ._-]?h3[ ._-]?image": ("MiniMax-H3-Image", "0.45.2"),
    r"moss[ ._-]?image": ("MOSS-Image", "0.42"),
    r"qwen[ ._-]?image[ ._-]?2[ ._-]?1(?![\da-z])": ("Qwen-Image-2.1", ""),
    r"flux[ ._-]?3(?![\da-z])": ("FLUX.3", ""),
    r"ltx[ ._-]?(v[ ._-]?)?2[ ._-]?5(?![\da-z])": ("LTX-2.5", ""),
}
LAST_WITHOUT = "0.33"  # the newest ComfyUI that is known not to read them

SMALLEST_MODEL = 16  # tensors of a file that is more than a part of a model
# What is in a file, the tensor of five dimensions that ComfyUI-GGUF's converter leaves out of a
# GGUF and writes beside it, and the model.
FIVE_DIMENSIONS = (
    ("head.modulation", "patch_embedding.weight", "Wan"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight",
     "HunyuanVideo"),
)
WIDTH = 256  # of a weight whose shape nothing says
MOST_TENSORS = 10_000  # of a file that is looked at, each time with another name
MOST_MISSING = 0.1  # of a model's names may be missing besides
ENDINGS = ("weight", "scale")
# the host's functions that look names up
DETECTION = (comfy.model_detection.detect_unet_config,
             comfy.model_detection.convert_diffusers_mmdit)


def reject_unknown_model(
        file: WeightFile, state_dict: dict[str, torch.Tensor],
        what: str = "holds no diffusion model that this ComfyUI knows") -> NoReturn:
    """Raises WeightFileError, which says why the host detects no model in a file.

    Args:
        file: of the weights.
        state_dict: of `file`, with the host's names.
        what: what is said where nothing tells why.
    """
    reject_side_model(file)
    prefix = model_prefix(state_dict)
    named = file.metadata.get("general.architecture")
    problem = (_missing_keys_text(state_dict, prefix) or _left_out_text(state_dict, prefix)
               or _uneven_bias_text(state_dict) or _cut_names_text(file.entries)
               or _newer_model_text(file.name, str(named or "")))
    if problem:
        raise WeightFileError(f"{file.name} {problem}")
    if lost := _find_deciding_weight(state_dict, prefix):
        raise WeightFileError(
            f"{file.name} lacks {safe_repr(lost)}, without which ComfyUI does"
            f" not know the model. {DOWNLOAD_AGAIN}")
    architecture = f"architecture {named!r}, " if named else ""
    raise WeightFileError(
        f"{file.name} {what} ({architecture}"
        f"{len(file.entries)} tensors, first {next(iter(file.entries), 'none')!r}). Update"
        " ComfyUI if the model is new, or pick another file.")


def _newer_model_text(*names: str) -> str | None:
    """Returns a sentence about a model that a newer ComfyUI reads, by what its file calls itself;
    None for no such model."""
    for pattern, (title, version) in NEWER_MODELS.items():
        if not any(re.search(pattern, name, re.IGNORECASE) for name in names):
            continue
        if not is_older(HOST_VERSION, version or f"{LAST_WITHOUT}.9"):
            return None
        since = f"from {version} on" if version else f"in a version after {LAST_WITHOUT}"
        return (f"is {title} by its name, which ComfyUI reads {since}; this is ComfyUI"
                f" {HOST_VERSION}. Update ComfyUI.")
    return None


def _missing_keys_text(state_dict: dict[str, torch.Tensor], prefix: str) -> str | None:
    """Returns a sentence about names that the host requires of a model that it knows.

    Args:
        state_dict: in which the host detects no model.
        prefix: of the model's names.

    Returns:
        What follows the file's name; None if no name is missing or the model is unknown.
    """
    config = try_detect(comfy.model_detection.detect_unet_config, state_dict, prefix)
    for model in comfy.supported_models.models if config is not None else ():
        keys = sorted(key.format(prefix) for key in model.required_keys)
        missing = [key for key in keys if key not in state_dict]
        if missing and model.matches(config):
            hint = MISSING_HINTS.get(model.__name__, "Get")
            return (f"lacks {' and '.join(map(repr, missing))}, which ComfyUI expects in a file of"
                    f" {model.__name__}. {hint} a conversion of a file that was made for ComfyUI.")
    return None


def _cut_names_text(names: Collection[str]) -> str | None:
    """Returns a sentence about names that were cut, None where none is as long as those are.

    Args:
        names: of a file in which the host detects no model.
    """
    cut = [name for name in names if len(name) == LONGEST_CUT
           and not name.endswith((".weight", ".bias", ".scale"))]
    if not cut or any(len(name) > LONGEST_CUT for name in names):
        return None
    return (f"has names of {LONGEST_CUT} characters, to which some programs cut them, such as"
            f" {safe_repr(cut[0])}: ComfyUI does not know the model by what is left. Get another"
            " conversion.")


def _left_out_text(names: Collection[str], prefix: str) -> str | None:
    """Returns a sentence about a tensor that a converter wrote beside the file; None without one.

    Args:
        names: of a file in which the host detects no model.
        prefix: of the model's names.
    """
    for present, left_out, model in FIVE_DIMENSIONS:
        if (f"{prefix}{present}" in names and f"{prefix}{left_out}" not in names
                and len(names) >= SMALLEST_MODEL):
            return (f"has no {left_out!r}: ComfyUI-GGUF's converter leaves this tensor of five"
                    f" dimensions of {model} out and writes it to a separate file,"
                    " fix_5d_tensors_…, which its fix_5d_tensors.py puts in. Do that, or get"
                    " another conversion.")
    return None


def _uneven_bias_text(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Returns a sentence about a bias of another length than its weight has rows; None without one.

    The host's conversion of names joins them, and stops at such a bias.

    Args:
        state_dict: in which the host detects no model.
    """
    for name, bias in state_dict.items():
        weight_name = f"{name.removesuffix('bias')}weight"
        weight = state_dict.get(weight_name) if name.endswith(".bias") else None
        if weight is not None and len(weight.shape) == 2 and bias.shape != weight.shape[:1]:
            return (f"is damaged: {name!r} has the shape {tuple(bias.shape)}, expected"
                    f" {weight.shape[0]} numbers, one for each row of {weight_name!r}."
                    f" {DOWNLOAD_AGAIN}")
    return None


def _find_deciding_weight(state_dict: dict[str, torch.Tensor], prefix: str) -> str | None:
    """Returns the weight with which the host would know a model, None where there is none.

    Args:
        state_dict: in which the host detects no model; only names and shapes matter.
        prefix: of the model's names.
    """
    names = dict.fromkeys(_names_in_detection()) if len(state_dict) < MOST_TENSORS else ()
    # on one device, where rows are joined; the host reads values of some vectors
    state_dict = {name: tensor if len(tensor.shape) < 2 else torch.empty(
        tensor.shape, dtype=torch.float32, device="meta") for name, tensor in state_dict.items()}
    for name in names:
        if f"{prefix}{name}" in state_dict:
            continue
        layer = f"{prefix}{name.rpartition('.')[0]}"
        bias = state_dict.get(f"{layer}.bias")
        shape = (WIDTH if bias is None else len(bias), WIDTH)
        completed = {**state_dict, f"{prefix}{name}": torch.empty(shape, dtype=torch.float32,
                                                                  device="meta")}
        if _fits(completed if prefix else from_diffusers(completed), prefix):
            return f"{prefix}{name}"
    return None


def _names_in_detection() -> Iterator[str]:
    """Yields the names of weights that are written in the host's detection."""
    codes = [function.__code__ for function in DETECTION]
    for code in codes:
        for value in code.co_consts:
            if hasattr(value, "co_consts"):
                codes.append(value)
            elif isinstance(value, str) and "." in value and " " not in value:
                name = value.replace("{}", "", value.startswith("{}"))
                yield from [name + ending for ending in ENDINGS] if name.endswith(".") else [name]


def _fits(state_dict: dict[str, torch.Tensor], prefix: str) -> bool:
    """Returns whether the host knows a model of these names and has hardly any others for it."""
    config = try_detect(comfy.model_detection.model_config_from_unet, state_dict, prefix)
    model = config and try_detect(config.get_model, state_dict, prefix, device="meta")
    if not model:
        return False
    wanted = {f"{prefix}{name}" for name in model.diffusion_model.state_dict()}
    return len(wanted - state_dict.keys()) <= MOST_MISSING * len(wanted)
