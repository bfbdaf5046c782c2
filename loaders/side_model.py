"""Loads the models that stand beside a diffusion model (ControlNets, model patches, CLIP vision) by
the host's functions, with this pack's layers for packed weights."""
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ..ops.load_hooks import dequantize_plain_parameters
from ..ops.operations import operations_for
from .comfy_keys import to_comfy_keys
from .comfy_quant import as_tensors, reject_unread_layers
from .detection import describe_other_kind, explain_shape_errors, is_diffusion_model
from .files import open_weights
from .files.container import WeightFile, WeightFileError
from .host_formats import EXACT, packed_formats
from .progress import Progress
from .reader_choice import needs_own_reader

log = logging.getLogger(__name__)

# What the host raises for a file that only begins like a model: it looks up and builds from what
# such a file lacks, and goes on without a model where it knows none.
UNKNOWN_ERRORS = (LookupError, AttributeError, TypeError, AssertionError, UnboundLocalError)

# (name of the file, state dict, metadata, layer classes or None for the host's) -> the host's model
Build = Callable[[str, dict[str, torch.Tensor], dict[str, str], type | None], Any]
# (file, state dict, progress) -> the weights to build the model with
Prepare = Callable[[WeightFile, dict[str, torch.Tensor], Progress], dict[str, torch.Tensor]]


def load_side_model(path: str, kind: str, build: Build, pack_to: str | None = None,
                    prepare: Prepare | None = None) -> tuple[Any, WeightFile | None]:
    """Loads a model by a function of the host.

    A file without packed weights is read as the host reads it. Small parts that the host computes
    with as plain tensors are dequantised.

    Args:
        path: of a file or folder.
        kind: of the model, for people, such as "ControlNet".
        build: calls the function of the host; returns None if the host knows no such model.
        pack_to: type that `prepare` packs weights to; None where it packs none.
        prepare: is called with the weights of a file that the host does not read.

    Returns:
        (what `build` returns, the file if its weights may be packed).

    Raises:
        WeightFileError: if the file cannot be read, is of another kind or of sizes that do not fit.
    """
    formats = packed_formats(EXACT, comfy.model_management.get_torch_device())
    name = os.path.basename(path)
    if not needs_own_reader(path, pack_to, formats):
        weights: Any
        weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        return _build(name, kind, build, weights, metadata, None), None
    file = open_weights(path)
    progress = Progress("reading", *(["packing"] if pack_to else []), f"building the {kind}")
    state_dict = file.state_dict(progress.track)
    state_dict = as_tensors(file, state_dict, formats=None if pack_to else formats)
    reject_unread_layers(file, state_dict)
    if prepare is not None:
        state_dict = prepare(file, state_dict, progress)
    with dequantize_plain_parameters():
        model = _build(name, kind, build, state_dict, file.text_metadata,
                       operations_for(state_dict))
    progress.stage()
    return model, file


def _build(name: str, kind: str, build: Build, state_dict: Mapping[str, torch.Tensor],
           metadata: Mapping[str, str] | None, operations: type | None) -> Any:
    try:
        with explain_shape_errors(name):
            model = build(name, dict(state_dict), dict(metadata or {}), operations)
    except UNKNOWN_ERRORS as error:
        log.debug("[Featherweight] The host knows no such %s", kind, exc_info=True)
        raise _unknown_error(name, kind, state_dict) from error
    if model is None:
        raise _unknown_error(name, kind, state_dict)
    return model


def _unknown_error(name: str, kind: str,
                   state_dict: Mapping[str, torch.Tensor]) -> WeightFileError:
    """Returns the error for a file that holds no model of a kind that the host knows."""
    other = describe_other_kind(state_dict, kind)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if other is None and is_diffusion_model(to_comfy_keys(tensors)):
        other = "a diffusion model"
    if other is not None:
        return WeightFileError(f"{name} is {other}, expected a {kind}. Pick a {kind} here.")
    return WeightFileError(
        f"{name} holds no {kind} that this ComfyUI knows ({len(state_dict)} tensors, first"
        f" {next(iter(state_dict), 'none')!r}). Pick another file, or update ComfyUI if the"
        f" {kind} is new.")
