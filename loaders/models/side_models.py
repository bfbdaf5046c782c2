"""Loads the models that stand beside a diffusion model (ControlNets, model patches, CLIP vision,
VAEs) by the host's functions, with this pack's layers for packed weights."""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters
from ...ops.log import log
from ...ops.packing.pack_types import ROW_TYPES
from ...ops.tensor.packed_layout import is_comfy_quantized
from ..comfyui.comfy_quant_weights import (
    as_tensors,
    host_metadata,
    in_parts,
    read_marked,
)
from ..comfyui.compute import AUTOMATIC, EXACT, computing, packed_formats
from ..comfyui.detection import UNKNOWN_ERRORS, explain_build_errors, is_diffusion_model
from ..comfyui.keep_packed import keep_packed
from ..comfyui.load_check import bytes_of, check_load
from ..comfyui.model_summary import log_load_summary
from ..comfyui.weight_keys import to_comfy_keys
from ..container.weight_file import WeightFile, WeightFileError, model_name, safe_repr
from ..files.open_weights import open_weights
from ..out_of_memory import is_out_of_memory
from ..progress import Progress
from ..quantizers.comfy_quant_marks import MARK
from ..refusals.wrong_kind import describe_other_kind
from .loader_choice import needs_own_reader
from .pack_on_load import PackStats, PackTo, pack_weights


@dataclass
class LoadedFile:
    """The file of a model that this pack has read, and what was packed of it while it was read."""

    file: WeightFile
    packed: PackStats | None

    def adopt(self, patcher: comfy.model_patcher.ModelPatcher, *dtypes: torch.dtype):
        """Makes the host's patcher of the model keep packed weights packed, and logs what it holds.

        Args:
            patcher: is changed in place.
            dtypes: that the model may compute in.
        """
        keep_packed(patcher, *dtypes)
        if self.packed:
            self.packed.attach(patcher)
        log_load_summary(self.file, patcher)


@dataclass(frozen=True)
class Kind:
    """A kind of model that a function of the host detects and builds.

    Attributes:
        title: for people, such as "ControlNet". `wrong_kind` knows some by their names.
        build: (name of the file, state dict, metadata, layer classes) -> the host's model, None
            where the host knows none such. It may change the state dict. Without packed weights the
            classes are None: the host's are to be used.
        wrap: (model, its file) -> None; has packed weights stay packed, by `LoadedFile.adopt`. It
            is called for a file that the host does not read.
        convert: state dict -> (stand-ins by which the host detects the model, weights), before the
            weights are packed; `build` gets both in one.
        prefix: of the model's names in some files; others are not packed in these.
    """

    title: str
    build: Callable[[str, dict[str, torch.Tensor], dict[str, str], type | None], Any]
    wrap: Callable[[Any, LoadedFile], None] | None = None
    convert: Callable[[dict[str, torch.Tensor]],
                      tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] | None = None
    prefix: str = ""


def load_side_model(path: str, kind: Kind, pack_to: PackTo | None = None,
                    compute: str = AUTOMATIC) -> Any:
    """Loads a model by a function of the host.

    A file without packed weights is read as the host reads it, unless they are to be packed. Small
    parts that the host computes with as plain tensors are dequantised.

    Args:
        path: of a file or folder.
        kind: of the model.
        pack_to: see `PackTo`; plain weights are packed to it as they are read.
        compute: one of `compute.CHOICES_OF_SIDE_MODELS`. With "automatic" the host's own
            formats in a file are computed exactly, but those that it is packed to as for models.

    Returns:
        What `kind.build` returns.

    Raises:
        WeightFileError: if the file cannot be read, is of another kind or of sizes that do not fit.
    """
    device: Any = comfy.model_management.get_torch_device()
    how, host_formats = computing(compute)
    if compute == AUTOMATIC and pack_to not in ROW_TYPES:
        host_formats = EXACT
    formats = packed_formats(EXACT, device)
    name = model_name(path)
    if not needs_own_reader(path, pack_to, formats):
        weights: Any
        weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        return _build(name, kind, weights, metadata, None, None)
    file = open_weights(path)
    progress = Progress("reading", *(["packing"] if pack_to else []), f"building the {kind.title}")
    state_dict = read_marked(file, progress.track)
    state_dict = as_tensors(file, state_dict, formats=None if pack_to else formats)
    stand_ins, state_dict = kind.convert(state_dict) if kind.convert else ({}, state_dict)
    packed = None
    if pack_to:
        is_prefixed = any(name.startswith(kind.prefix) for name in state_dict)
        packed = pack_weights(file, state_dict, pack_to, progress,
                              kind.prefix if is_prefixed else "", device)

    def build_of(weights: dict[str, torch.Tensor]) -> Any:
        with dequantize_plain_parameters():
            return _build(name, kind, stand_ins | weights, host_metadata(file),
                          operations_for(weights, compute=how), file.notes)

    model = None
    if host_formats != EXACT:
        parts = in_parts(state_dict, packed_formats(host_formats, device))
        if parts.keys() != state_dict.keys():
            model = _build_of_the_hosts_layers(build_of, parts)
    if model is None:
        model = build_of(state_dict)
    progress.stage()
    if kind.wrap:
        kind.wrap(model, LoadedFile(file, packed))
    return model


def _build_of_the_hosts_layers(build: Callable[[dict[str, torch.Tensor]], Any],
                               parts: dict[str, torch.Tensor]) -> Any:
    """Returns a model whose packed layers are the host's, None where it cannot have them all.

    The host renames the layers of some models without their scales, and has others of torch's own.

    Args:
        build: makes the model of a state dict.
        parts: of `in_parts`.
    """
    try:
        model = build(parts)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.debug("ComfyUI does not take its own layers here", exc_info=True)
        return None
    patcher = getattr(model, "control_model_wrapped", getattr(model, "patcher", model))
    of_the_host = sum(map(is_comfy_quantized, patcher.model.parameters()))
    return model if of_the_host == sum(name.endswith(MARK) for name in parts) else None


# by which the host knows a ControlNet of a UNet in diffusers' names
DIFFUSERS_CONTROLNET = "controlnet_cond_embedding.conv_in.weight"


def _build(name: str, kind: Kind, state_dict: Mapping[str, torch.Tensor],
           metadata: Mapping[str, str] | None, operations: type | None,
           notes: Iterable[str] | None) -> Any:
    try:
        with explain_build_errors(name), check_load(name, notes, bytes_of(state_dict)) as check:
            given = dict(state_dict)
            model = kind.build(name, given, dict(metadata or {}), operations)
            check.attach(model)
            if DIFFUSERS_CONTROLNET in state_dict:
                check.leave_over(given)  # from which the host takes what it renames
    except UNKNOWN_ERRORS as error:
        log.debug("ComfyUI knows no such %s", kind.title, exc_info=True)
        raise _unknown_error(name, kind.title, state_dict) from error
    if model is None:
        raise _unknown_error(name, kind.title, state_dict)
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
        f" {safe_repr(next(iter(state_dict), 'none'))}). Pick another file, or update ComfyUI if"
        f" the {kind} is new.")
