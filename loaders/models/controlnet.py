"""Loads ControlNets and T2I-Adapters; packed weights of a ControlNet stay packed."""
import functools
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import comfy.controlnet
import comfy.model_management
import torch

from ...ops.tensor.packed_layout import is_packed
from ..comfyui.compute import AUTOMATIC, follows_model, guided_dtypes
from ..comfyui.diffusers_keys import from_diffusers, reject_incomplete
from ..comfyui.keep_packed import keep_packed
from ..container.weight_file import WeightFileError
from ..files.open_weights import open_weights
from ..quantizers.comfy_quant_marks import MARK
from ..refusals.wrong_kind import CONTROLNET
from .pack_on_load import PackTo
from .side_models import Kind, LoadedFile, load_side_model

CONTROL_PREFIX = "control_model."  # before the names in files of LDM's ControlNets
# What the tensors of ControlNets begin with, and those of T2I-Adapters do not.
CONTROLNET_NAMES = re.compile(
    r"(control_model\.)?(control|single_controlnet_|zero_convs\.|after_proj_list\.)")


def load_controlnet(path: str, pack_to: PackTo | None = None,
                    compute: str = AUTOMATIC) -> comfy.controlnet.ControlBase:
    """Loads a ControlNet and keeps its packed weights packed.

    The small parts that ComfyUI computes with as plain tensors, T2I-Adapters and Control-LoRAs are
    dequantised; the weights of the latter two are not packed.

    Arguments and errors are those of `load_side_model`. One more: if the weights of the file are to
    be added to those of a model.
    """
    if pack_to and not _may_be_packed(open_weights(path).entries):
        pack_to = None

    kind = Kind(CONTROLNET, _build, _wrap_control,
                functools.partial(_convert_fused, lazy=pack_to is not None), CONTROL_PREFIX)
    return load_side_model(path, kind, pack_to, compute)


def _may_be_packed(names: Iterable[str]) -> bool:
    """Returns whether a file with these names holds a ControlNet with weights of its own."""
    names = set(names)
    return (any(CONTROLNET_NAMES.match(name) for name in names)
            and not names & {"lora_controlnet", "difference"})


def _build(name: str, state_dict: dict[str, torch.Tensor], metadata: dict[str, str],
           operations: type | None) -> Any:
    """Builds the host's ControlNet from the weights of a file, see `Kind.build`."""
    if "difference" in state_dict:
        raise WeightFileError(
            f"{name} holds the difference between a ControlNet and a model (it has 'difference'),"
            " expected a complete ControlNet. Get one with all its weights, or load an unpacked one"
            " with ComfyUI's Load ControlNet Model (diff).")
    reject_incomplete(name, state_dict)
    options: dict[str, Any] = {}
    if re.search(r"_shuffle(?![a-zA-Z])", name):  # which the host knows by its name only
        options["global_average_pooling"] = True
    if operations is not None:
        options["custom_operations"] = operations
        # or the host takes the dtype of a packed weight, or of codes
        if "control_img_in.weight" in state_dict or any(key.endswith(MARK) for key in state_dict):
            options["dtype"] = comfy.model_management.unet_dtype(
                model_params=-1, supported_dtypes=[torch.bfloat16, torch.float32])
    return comfy.controlnet.load_controlnet_state_dict(state_dict, model_options=options)


def _convert_fused(state_dict: Mapping[str, torch.Tensor],
                   lazy: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Makes the weights that the host makes of several of diffusers' (q, k and v), as
    `Kind.convert`; those of a Control-LoRA, which the host copies into a model's, are dequantised.

    The host detects a ControlNet by diffusers' names and joins the weights itself, which would
    dequantise packed ones. So its names get what needs no memory, and the joined weights that are
    here under their own names replace what the host makes of that.
    """
    if "lora_controlnet" in state_dict:
        state_dict = {key: tensor.dequantize() if is_packed(tensor) else tensor
                      for key, tensor in state_dict.items()}
    converted = from_diffusers(dict(state_dict), lazy)
    sources = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in state_dict.items() if name not in converted
    }
    return sources, converted


def _wrap_control(control: Any, packed_file: LoadedFile):
    if hasattr(control, "control_model_wrapped"):
        packed_file.adopt(control.control_model_wrapped, *_dtypes_of(control))
        _follow(control)


def _dtypes_of(control: Any) -> set[torch.dtype]:
    """Returns what a ControlNet may compute in."""
    own = control.manual_cast_dtype or control.control_model_wrapped.model.dtype
    guided = guided_dtypes(control.load_device) if follows_model(control) else ()
    return {own, *guided}


def _follow(control: Any):
    """Has a ControlNet and all copies of it keep packed weights packed, and on a CPU compute in
    what the guided model computes in.

    The ControlNet keeps the host's class, by which Advanced-ControlNet and other packs know what it
    is; they copy it into a class of their own by `copy_to`, which this follows.
    """
    for name, following in (("copy_to", _copy_to), ("pre_run", _pre_run),
                            ("deepclone_multigpu", _deepclone_multigpu)):
        _wrap(control, name, following)


def _wrap(control: Any, name: str, following: Callable):
    """Gives an object a method that calls `following` with the object and its own method.

    The method does not keep the object alive, or the host would count its model as loaded until
    Python collects circles.
    """
    reference, of_instance = weakref.ref(control), vars(control).get(name)

    def method(*args, **kwargs):
        own = of_instance or functools.partial(getattr(type(reference()), name), reference())
        return following(reference(), own, *args, **kwargs)

    setattr(control, name, method)


def _copy_to(control: Any, own: Callable, copied: Any, *args, **kwargs):
    own(copied, *args, **kwargs)
    _follow(copied)


def _pre_run(control: Any, own: Callable, model: Any, *args, **kwargs):
    if follows_model(control):
        dtype = model.get_dtype_inference()
        control.manual_cast_dtype = dtype if dtype == torch.bfloat16 else None
    return own(model, *args, **kwargs)


def _deepclone_multigpu(control: Any, own: Callable, *args, **kwargs) -> Any:
    clone = own(*args, **kwargs)
    model: Any = clone.control_model
    del model.packed_patches, model.packed_residency  # a copy has its own
    keep_packed(clone.control_model_wrapped, *_dtypes_of(clone))
    return clone
