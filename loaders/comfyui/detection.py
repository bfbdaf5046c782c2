"""Detects models by the names and shapes of their weights, in foreign and partial files too."""
import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import torch

from ...ops.log import log
from ..container.weight_file import (
    DOWNLOAD_AGAIN,
    WeightFile,
    WeightFileError,
    first_line,
    safe_repr,
)
from ..name_lists import join_some
from ..out_of_memory import is_out_of_memory
from ..quantizers.nunchaku import has_nunchaku_weights

# What the host raises for such files: its detection looks up, indexes and divides by what they may
# lack.
DETECTION_ERRORS = (
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    ValueError,
    RuntimeError,
)

UNKNOWN_MODEL = "ERROR: Could not detect"  # begins the host's error for an unknown file
# What the host raises for a file that only begins like a model: it looks up and builds from what
# such a file lacks, and goes on without a model where it knows none.
UNKNOWN_ERRORS = (LookupError, AttributeError, TypeError, AssertionError, NameError)

# The host's class of a model -> how the advice begins where its file lacks weights.
MISSING_HINTS = {"SeedVR2": "Put SeedVR2's pos_emb.pt and neg_emb.pt next to it, or get"}

# The host's class of a part of a model -> where to find it, if a file of the model lacks it.
PARTS_ELSEWHERE = {
    "NumberConditioner": "They are in the checkpoint of Stable Audio: pick that in Load Checkpoint"
                         " (GGUF, Featherweight)."
}

# The host counts blocks in a time that grows with blocks times tensors.
MAX_BLOCKS = 1000
BLOCK = re.compile(r"\.(\d+)\.")


def reject_endless_blocks(file: WeightFile):
    """Raises WeightFileError where the names of a file number more blocks than any model has."""
    numbers = {number[1] for number in map(BLOCK.search, file.entries) if number}
    if len(numbers) > MAX_BLOCKS:
        raise WeightFileError(
            f"{file.name} numbers {len(numbers):,} blocks in its names, expected at most"
            f" {MAX_BLOCKS:,}. {DOWNLOAD_AGAIN}")


def try_detect(function: Callable, *arguments, **options) -> Any:
    """Calls one of the host's detection or conversion functions.

    Returns:
        Its result; None if names or shapes are missing that it relies on, as for an unknown model.

    Raises:
        MemoryError, RuntimeError: if memory is short, which says nothing about the model.
    """
    try:
        return function(*arguments, **options)
    except DETECTION_ERRORS as error:
        if is_out_of_memory(error):
            raise
        log.debug("ComfyUI's %s does not know the model",
                  getattr(function, "__name__", function), exc_info=True)
        return None


def is_diffusion_model(state_dict: dict[str, torch.Tensor]) -> bool:
    """Returns whether the host detects a diffusion model, by its own names or those of diffusers'
    UNets."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
        if name.startswith(prefix)
    } or state_dict
    if try_detect(comfy.model_detection.detect_unet_config, weights, "") is not None:
        return True
    config = try_detect(comfy.model_detection.unet_config_from_diffusers_unet, weights)
    return config is not None


def missing_keys_text(state_dict: dict[str, torch.Tensor], prefix: str) -> str | None:
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


# Names of models whose sizes the host reads from `config` in the metadata, where there is one.
SIZED_BY_CONFIG = ("adaln_single.emb.timestep_embedder.linear_1.bias",)  # LTX
SMALLEST_MODEL = 16  # tensors of a file that is more than a part of a model
# What is in a file, the tensor of five dimensions that ComfyUI-GGUF's converter leaves out of a
# GGUF and writes beside it, and the model.
FIVE_DIMENSIONS = (
    ("head.modulation", "patch_embedding.weight", "Wan"),
    ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight",
     "HunyuanVideo"),
)


# characters that ggml keeps of a name
LONGEST_CUT = 63


def cut_names_text(names: Collection[str]) -> str | None:
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


@contextlib.contextmanager
def explain_missing_config(file: WeightFile):
    """Raises WeightFileError with the reason if a model does not load because its file has lost
    the metadata with its sizes."""
    try:
        yield
    except WeightFileError as error:
        has_sizes = not any(name.endswith(SIZED_BY_CONFIG) for name in file.entries)
        if has_sizes or "config" in file.text_metadata:
            raise
        raise WeightFileError(
            f"{file.name} has no `config` in its metadata, from which ComfyUI takes the sizes"
            " of an LTX model. Get a conversion that keeps it, or the original file.") from error


def left_out_text(names: Collection[str], prefix: str) -> str | None:
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


def uneven_bias_text(state_dict: Mapping[str, torch.Tensor]) -> str | None:
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


@contextlib.contextmanager
def explain_build_errors(name: str):
    """Raises WeightFileError if the host cannot build a model with the weights of a file.

    Args:
        name: of the file.
    """
    advice = (
        "Download it again if a part of it may be missing, or get another conversion of the"
        " model."
    )
    try:
        yield
    except WeightFileError:
        raise
    except (ArithmeticError, AssertionError, IndexError, ValueError) as error:
        raise WeightFileError(
            f"{name}: ComfyUI knows the names of the weights, but cannot build a model"
            f" of their number and sizes ({first_line(error)}). {advice}") from error
    except RuntimeError as error:
        mismatch = shape_mismatch_text(error)
        if mismatch is None:
            raise
        elsewhere = [hint for part, hint in PARTS_ELSEWHERE.items() if f" {part}:" in str(error)]
        raise WeightFileError(f"{name}: {mismatch} {''.join(elsewhere) or advice}") from error


def shape_mismatch_text(error: RuntimeError) -> str | None:
    """Returns a sentence for torch's error about weights of other shapes than the model's; None for
    other errors."""
    heading, *mismatches = str(error).split("\n\t")
    if not mismatches or "loading state_dict for " not in heading:
        return None
    model = heading.rpartition(" ")[2].rstrip(":")
    if match := re.match(r"(Missing|Unexpected) key\(s\) in state_dict: ", mismatches[0]):
        names = join_some(map(safe_repr, re.findall('"([^"]*)"', mismatches[0])))
        return (f"it lacks weights of ComfyUI's {model}: {names}." if match[1] == "Missing" else
                f"ComfyUI's {model} has no {names}.")
    return f"the names of the weights are those of {model}, their sizes are not: {mismatches[0]}"


# Names of tensors that no diffusion model has, what such a file is, and where to load it.
NOT_DIFFUSION = (
    (
        r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|^text_model\.embeddings\."
        r"|^(model|encoder)\.embed_tokens\.",
        "a text encoder",
        "Pick it in Load Text Encoder (GGUF, Featherweight).",
    ),
    (
        r"^(v\.blk|mm)\.",
        "the vision part (mmproj) of a text encoder",
        "Pick it in Load Text Encoder (GGUF, Featherweight), under mmproj.",
    ),
    (
        r"\.lora_(a|b|A|B|up|down)(\.weight)?$",
        "a LoRA",
        "Load a model here and put the LoRA in a LoRA loader after it.",
    ),
)


# Names of tensors that only these models beside a diffusion model have, the kind and the family.
MODEL_PATCH, CLIP_VISION, CONTROLNET = "model patch", "CLIP vision model", "ControlNet"
SIDE_MODELS = (
    (r"^control_all_x_embedder\.", MODEL_PATCH, "Z-Image Fun ControlNet"),
    (r"^controlnet_blocks\.\d+\.y_rms\.", MODEL_PATCH, "Qwen-Image DiffSynth ControlNet"),
    (r"^controlnet_patch_embedding\.", MODEL_PATCH, "Uni3C ControlNet for Wan"),
    (r"^audio_proj\.proj1\.", MODEL_PATCH, "MultiTalk or InfiniteTalk for Wan"),
    (r"^feature_embedder\.", MODEL_PATCH, "USO style projector for Flux"),
    (r"^lllite_", MODEL_PATCH, "LLLite for Anima"),
    (r"(^|\.)project_modules\.", MODEL_PATCH, "SUPIR for SDXL"),
    (r"^vision_model\.encoder\.layers\.47\.|^visual\.transformer\.resblocks\.47\.", CLIP_VISION,
     "CLIP bigG"),
    (r"^vision_model\.encoder\.layers\.30\.|^visual\.transformer\.resblocks\.30\.", CLIP_VISION,
     "CLIP H"),
    (r"^vision_model\.encoder\.layers\.26\.", CLIP_VISION, "SigLIP"),
    (r"^vision_model\.encoder\.layers\.22\.|^visual\.transformer\.resblocks\.22\.", CLIP_VISION,
     "CLIP L"),
    (r"^encoder\.layer\.\d+\.layer_scale\d\.", CLIP_VISION, "DINOv2"),
    (r"^layer\.\d+\.mlp\.(gate|up)_proj\.", CLIP_VISION, "DINOv3"),
    (r"^(control_model\.|controlnet_|input_hint_block\.|zero_convs\.)", CONTROLNET, ""),
)
SIDE_LOADERS = {MODEL_PATCH: "Load Model Patch (Featherweight)",
                CLIP_VISION: "Load CLIP Vision (Featherweight)",
                CONTROLNET: "Load ControlNet (Featherweight)"}


def find_side_model(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Returns (kind, family, name that shows it) of a model beside a diffusion model.

    Returns:
        Of the first match in `SIDE_MODELS`; None for other names.
    """
    return first_match(names, SIDE_MODELS)


def describe_other_kind(names: Iterable[str], kind: str) -> str | None:
    """Returns what a file is by the names of its tensors: "a LoRA (it has 'x.lora_A')".

    Args:
        names: of the tensors.
        kind: that was expected.

    Returns:
        Another kind, one of `NOT_DIFFUSION` or `SIDE_MODELS`; None if the names are those of none.
    """
    names = list(names)
    if match := first_match(names, NOT_DIFFUSION):
        title, _, name = match
        return f"{title} (it has {name!r})"
    match = find_side_model(names)
    return f"a {match[0]} (it has {match[2]!r})" if match and match[0] != kind else None


def first_match(names: Iterable[str],
                 table: Iterable[tuple[str, str, str]]) -> tuple[str, str, str] | None:
    """Returns the two texts of the first row whose pattern is in one of some names, and that name.

    Args:
        names: of tensors.
        table: rows of a pattern and two texts.
    """
    names = list(names)
    for pattern, first, second in table:
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            return first, second, name
    return None


def reject_non_diffusion(file: WeightFile):
    """Raises WeightFileError for a text encoder, mmproj or LoRA picked as a diffusion model."""
    names = list(file.entries)
    if has_nunchaku_weights(names):  # its first files call the low rank of a weight a LoRA
        names = [name for name in names if not name.endswith((".lora_down", ".lora_up"))]
    if match := first_match(names, NOT_DIFFUSION):
        raise _not_diffusion(file, *match)


def _not_diffusion(file: WeightFile, title: str, advice: str, name: str) -> WeightFileError:
    return WeightFileError(
        f"{file.name} is {title} (it has {name!r}), expected a diffusion model. {advice}")


VAE_PREFIXES = ("first_stage_model.", "vae.")  # of a checkpoint's names
VAE = (
    rf"^({'|'.join(map(re.escape, VAE_PREFIXES))})?("
    r"(taesd_)?(decoder|encoder)\.(conv_?in|conv1|mid|down|up|\d+|layers\.\d+\.block)\b|post_quant_conv\.)"
)
# what the host knows VAEs by: all names in its code
VAE_NAMES = frozenset(name for name in comfy.sd.VAE.__init__.__code__.co_consts
                      if isinstance(name, str) and "." in name)
CONNECTORS = re.compile(r"(^|\.)((video|audio)_embeddings_connector|text_embedding_projection)\.")


def find_other_part(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Returns what a file is in which the host detects no diffusion model, what to do with it, and
    the name that shows it; None for other names."""
    names = list(names)
    if names and all(map(CONNECTORS.search, names)):
        return ("a module with LTX-2's connectors", "Pick it in Load Diffusion Model"
                " (GGUF, Featherweight), at module, or with the text encoder.", names[0])
    vae = next((name for name in names if re.search(VAE, name) or any(
        name.removeprefix(prefix) in VAE_NAMES for prefix in VAE_PREFIXES)), None)
    if vae is None or any(name.startswith("model.diffusion_model.") for name in names):
        return None
    return "a VAE", "Load it with Load VAE.", vae


def reject_side_model(file: WeightFile):
    """Raises WeightFileError for one of `SIDE_MODELS`, or for a part of a model, such as a VAE,
    picked as a diffusion model."""
    if match := find_side_model(file.entries):
        kind, _, name = match
        raise _not_diffusion(file, f"a {kind}", f"Pick it in {SIDE_LOADERS[kind]}.", name)
    if match := find_other_part(file.entries):
        raise _not_diffusion(file, *match)
