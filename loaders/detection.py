"""What the host says about a model by the names and shapes of its weights, of foreign and partial
files too."""
import contextlib
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import comfy.model_detection
import torch

from .files.container import WeightFile, WeightFileError, first_line
from .out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

# What it raises for those: its detection and its tables look up, index and divide what a model of
# theirs would have.
DETECTION_ERRORS = (
    LookupError,
    ArithmeticError,
    AttributeError,
    TypeError,
    ValueError,
    RuntimeError,
)


def try_detect(ask: Callable, *arguments, **options) -> Any:
    """What one of the host's functions of detection or conversion gives for a model; None, as for
    one that it does not know, where names or shapes that it counts on are missing. A lack of memory
    says nothing of the model and goes on as an error.
    """
    try:
        return ask(*arguments, **options)
    except DETECTION_ERRORS as error:
        if is_out_of_memory(error):
            raise
        log.debug("[Featherweight] The host's %s does not know the model",
                  getattr(ask, "__name__", ask), exc_info=True)
        return None


def is_diffusion_model(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether the host takes some of these weights, in its own names or those of diffusers' UNets,
    for a diffusion model's."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state_dict)
    inside = {
        name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
    return (
        try_detect(comfy.model_detection.detect_unet_config, inside or state_dict, "") is not None
        or try_detect(comfy.model_detection.unet_config_from_diffusers_unet, inside or state_dict)
        is not None
    )


@contextlib.contextmanager
def explain_shape_errors(file: WeightFile):
    """Raise WeightFileError where the host builds no model of a file's weights, or one of other
    sizes than they have."""
    advice = "Download it again where a part of it may be missing, or get another conversion of the model."
    try:
        yield
    except WeightFileError:
        raise
    except (ArithmeticError, ValueError) as error:
        raise WeightFileError(
            f"{file.path.name}: ComfyUI knows the names of the weights, and cannot build a model"
            f" of their sizes ({first_line(error)}). {advice}") from error
    except RuntimeError as error:
        other = shape_mismatch_text(error)
        if other is None:
            raise
        raise WeightFileError(f"{file.path.name}: {other} {advice}") from error


def shape_mismatch_text(error: RuntimeError) -> str | None:
    """A sentence for what torch says where weights have other sizes than the model's of those
    names; None for other errors."""
    model, *mismatches = str(error).split("\n\t")
    if not mismatches or "loading state_dict for " not in model:
        return None
    return f"the names of the weights are those of {model.rpartition(' ')[2].rstrip(':')}, their sizes are not: {mismatches[0]}"


# Tensor names that no diffusion model has: what the file is, and what to do with it.
NOT_DIFFUSION = ((
    r"^(enc\.)?blk\.\d|^token_embd\.|^shared\.weight$|^text_model\.embeddings\.|^(model|encoder)\.embed_tokens\.",
    "a text encoder", "Pick it in Load Text Encoder (Featherweight)."),
                 (r"^(v\.blk|mm)\.", "the vision part (mmproj) of a text encoder",
                  "Pick it in Load Text Encoder (Featherweight), under mmproj."),
                 (r"\.lora_(a|b|A|B|up|down)(\.weight)?$", "a LoRA",
                  "Load a model here and put the LoRA in a LoRA loader behind it."))


def reject_non_diffusion(file: WeightFile):
    """Raise WeightFileError for a text encoder, mmproj or LoRA picked as a diffusion model."""
    for pattern, title, advice in NOT_DIFFUSION:
        name = next((name for name in file.entries if re.search(pattern, name)), None)
        if name is not None:
            raise WeightFileError(f"{os.path.basename(file.path)} is {title} (it has {name!r}),"
                                  f" expected a diffusion model. {advice}")
