"""Loads ControlNets and T2I-Adapters; packed weights of a ControlNet stay packed."""
import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import comfy.controlnet
import comfy.model_management
import comfy.utils
import torch

from ..ops.kernel_warmup import prepare_kernels
from ..ops.load_hooks import dequantize_plain_parameters
from ..ops.operations import operations_for
from ..ops.packed_layout import is_packed
from ..ops.patcher import adopt
from .comfy_bridge import guard_of, log_load_summary
from .comfy_keys import model_prefix, to_comfy_keys
from .comfy_quant import as_tensors, reject_unread_layers
from .compute_choice import follows_model
from .detection import describe_other_kind, explain_shape_errors, is_diffusion_model
from .diffusers_keys import from_diffusers
from .files import open_weights
from .files.container import WeightFileError
from .host_formats import EXACT, packed_formats
from .pack_on_load import pack_weights
from .progress import Progress
from .reader_choice import needs_own_reader

log = logging.getLogger(__name__)

PREFIX = "control_model."  # before the names in files of LDM's ControlNets
# What the tensors of ControlNets begin with, and those of T2I-Adapters do not.
CONTROLNET_NAMES = re.compile(
    r"(control_model\.)?(control|single_controlnet_|zero_convs\.|after_proj_list\.)")
# What the host raises for a file that only begins like a ControlNet: it looks up and builds from
# what such a file lacks.
UNKNOWN_ERRORS = (LookupError, AttributeError, TypeError, AssertionError)

# Type checkers see a subclass of the host's; `_packed_class` makes the real one.
_HostControl = comfy.controlnet.ControlNet if TYPE_CHECKING else object


class PackedControlNet(_HostControl):
    """Mixin over the host's ControlNets: copies keep packed weights packed, and a run checks that
    the file has not changed. On a CPU it computes in what the guided model computes in."""

    def copy(self, *args, **kwargs):
        return _as_packed(super().copy(*args, **kwargs))

    def pre_run(self, model, *args, **kwargs):
        packed_model: Any = self.control_model_wrapped.model
        packed_model.packed_patches.check_source()
        if follows_model(self):
            dtype = model.get_dtype_inference()
            self.manual_cast_dtype = dtype if dtype == torch.bfloat16 else None
        super().pre_run(model, *args, **kwargs)

    def deepclone_multigpu(self, *args, **kwargs):
        clone = super().deepclone_multigpu(*args, **kwargs)
        model: Any = clone.control_model
        del model.packed_patches, model.packed_residency  # a copy has its own
        _keep_packed(clone)
        return clone


def load_controlnet(path: str, pack_to: str | None = None) -> comfy.controlnet.ControlBase:
    """Loads a ControlNet and keeps its packed weights packed.

    The small parts that ComfyUI computes with as plain tensors, T2I-Adapters and Control-LoRAs are
    dequantised. A file without packed weights goes to the host's own loader, unless it is to be
    packed.

    Args:
        path: of a file or a folder of diffusers.
        pack_to: one of `pack_on_load.TYPES`; plain weights are packed to it as they are read, but
            not those of T2I-Adapters and Control-LoRAs.

    Raises:
        WeightFileError: if the file cannot be read or holds no known ControlNet.
    """
    formats = packed_formats(EXACT, comfy.model_management.get_torch_device())
    name = os.path.basename(path)
    if not needs_own_reader(path, pack_to, formats):
        weights: Any = comfy.utils.load_torch_file(path, safe_load=True)
        return build_controlnet(name, weights)
    file = open_weights(path)
    if not _may_be_packed(file.entries):
        pack_to = None
    stages = ("packing", "building the ControlNet") if pack_to else ("building the ControlNet",)
    progress = Progress("reading", *stages)
    state_dict = file.state_dict(progress.track)
    state_dict = as_tensors(file, state_dict, model_prefix(state_dict),
                            None if pack_to else formats)
    reject_unread_layers(file, state_dict)
    if "lora_controlnet" in state_dict:  # the host copies its weights into a model's
        state_dict = {key: tensor.dequantize() if is_packed(tensor) else tensor
                      for key, tensor in state_dict.items()}
    sources, state_dict = _convert_fused(state_dict, lazy=pack_to is not None)
    packed = None
    if pack_to:
        prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
        packed = pack_weights(file, state_dict, pack_to, progress, prefix)
    state_dict = sources | state_dict
    options = {"custom_operations": operations_for(state_dict)}
    with dequantize_plain_parameters():
        control: Any = build_controlnet(name, state_dict, options)
    if hasattr(control, "control_model_wrapped"):
        _keep_packed(control)
        if packed:
            packed.attach(control.control_model_wrapped)
        log_load_summary(file, control.control_model_wrapped)
    progress.stage()
    return control


def _may_be_packed(names: Iterable[str]) -> bool:
    """Returns whether a file with these names holds a ControlNet with weights of its own."""
    names = set(names)
    return (any(CONTROLNET_NAMES.match(name) for name in names)
            and not names & {"lora_controlnet", "difference"})


def build_controlnet(name: str, state_dict: Mapping[str, torch.Tensor],
                     model_options: Mapping[str, Any] | None = None) -> Any:
    """Builds the host's ControlNet from the weights of a file.

    Args:
        name: of the file.
        state_dict: of the file; it is not changed.
        model_options: the host's.

    Raises:
        WeightFileError: if the host knows no such ControlNet, the sizes of the weights do not fit,
            or they are to be added to those of a model.
    """
    if "difference" in state_dict:
        raise WeightFileError(
            f"{name} holds the difference between a ControlNet and a model (it has 'difference'),"
            " expected a whole ControlNet. Get one with all its weights, or load an unpacked one"
            " with ComfyUI's Load ControlNet Model (diff).")
    options = dict(model_options or {})
    if _averages_over_picture(name):
        options["global_average_pooling"] = True
    # the host would take the dtype of a packed weight
    if "custom_operations" in options and "control_img_in.weight" in state_dict:
        options["dtype"] = comfy.model_management.unet_dtype(
            model_params=-1, supported_dtypes=[torch.bfloat16, torch.float32])
    try:
        with explain_shape_errors(name):
            control = comfy.controlnet.load_controlnet_state_dict(
                dict(state_dict), model_options=options)
    except UNKNOWN_ERRORS as error:
        log.debug("[Featherweight] The host knows no such ControlNet", exc_info=True)
        raise _unknown_error(name, state_dict) from error
    if control is None:
        raise _unknown_error(name, state_dict)
    return control


def _convert_fused(state_dict: Mapping[str, torch.Tensor],
                   lazy: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Makes the weights that the host makes of several of diffusers' (q, k and v).

    The host detects a ControlNet by diffusers' names and joins the weights itself, which would
    dequantise packed ones. So its names get what needs no memory, and the joined weights that are
    here under their own names replace what the host makes of that.

    Args:
        state_dict: of the file.
        lazy: see `from_diffusers`.

    Returns:
        Stand-ins without memory for the weights that were converted, and the other weights beside
        what was made of them.
    """
    converted = from_diffusers(dict(state_dict), lazy)
    sources = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state_dict.items() if name not in converted
    }
    return sources, converted


def _keep_packed(control: Any):
    """Makes the patcher of a ControlNet, which the host has built, keep packed weights packed."""
    patcher = adopt(control.control_model_wrapped)
    model = patcher.model
    model.packed_patches.check_source = guard_of(model)
    prepare_kernels(model, patcher.load_device, control.manual_cast_dtype or model.dtype)
    _as_packed(control)


def _as_packed(control: Any) -> Any:
    """Changes the class of a ControlNet to its `PackedControlNet`, and returns it."""
    if not isinstance(control, PackedControlNet):
        control.__class__ = _packed_class(type(control))
    return control


@functools.cache
def _packed_class(cls: type) -> type:
    return type(f"Packed{cls.__name__}", (PackedControlNet, cls), {})


def _averages_over_picture(name: str) -> bool:
    """Returns whether a file is a "shuffle" ControlNet, which the host knows by its name only."""
    return re.search(r"_shuffle(?![a-zA-Z])", name) is not None


def _unknown_error(name: str, state_dict: Mapping[str, torch.Tensor]) -> WeightFileError:
    """Returns the error for a file that holds no ControlNet that the host knows."""
    other = describe_other_kind(state_dict)
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
    if other is None and is_diffusion_model(to_comfy_keys(tensors)):
        other = "a diffusion model"
    if other is not None:
        return WeightFileError(
            f"{name} is {other}, expected a ControlNet. Pick a ControlNet here.")
    return WeightFileError(
        f"{name} holds no ControlNet that this ComfyUI knows ({len(state_dict)} tensors, first"
        f" {next(iter(state_dict), 'none')!r}). Pick another file, or update ComfyUI if the"
        " ControlNet is new.")
