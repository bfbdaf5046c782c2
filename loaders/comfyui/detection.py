"""Detects models by the names and shapes of their weights, in foreign and partial files too."""
import contextlib
import re
from collections.abc import Callable
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


# Names of models whose sizes the host reads from `config` in the metadata, where there is one.
SIZED_BY_CONFIG = ("adaln_single.emb.timestep_embedder.linear_1.bias",)  # LTX


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


BUILD_ADVICE = ("Download it again if a part of it may be missing, or get another conversion of the"
                " model.")


@contextlib.contextmanager
def explain_build_errors(name: str, mismatch_advice: str = BUILD_ADVICE,
                         *others: type[Exception]):
    """Raises WeightFileError if the host cannot build a model with the weights of a file.

    Args:
        name: of the file, or of several.
        mismatch_advice: where the weights have other sizes than the model.
        others: further errors that say of a model of this kind that it cannot be built.
    """
    try:
        yield
    except WeightFileError:
        raise
    except (ArithmeticError, AssertionError, IndexError, ValueError, *others) as error:
        raise WeightFileError(
            f"{name}: ComfyUI knows the names of the weights, but cannot build a model"
            f" of their number and sizes ({first_line(error)}). {BUILD_ADVICE}") from error
    except RuntimeError as error:
        mismatch = shape_mismatch_text(error)
        if mismatch is None:
            raise
        elsewhere = [hint for part, hint in PARTS_ELSEWHERE.items() if f" {part}:" in str(error)]
        advice = "".join(elsewhere) or mismatch_advice
        raise WeightFileError(f"{name}: {mismatch} {advice}") from error


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
