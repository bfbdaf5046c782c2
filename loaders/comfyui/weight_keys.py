"""Converts names and shapes of a model's weights from a file's to the host's."""
import re
from collections.abc import Iterable
from typing import Any

import torch
from comfy.model_detection import (
    detect_unet_config,
    model_config_from_unet,
    unet_prefix_from_state_dict,
)

from ...ops.tensor.packed_layout import is_packed, relabel
from ..quantizers.comfy_quant_marks import WRAPPERS
from .detection import try_detect
from .diffusers_keys import from_diffusers


def to_comfy_keys(state_dict: dict[str, torch.Tensor],
                  lazy: bool = False) -> dict[str, torch.Tensor]:
    """Converts a model's or checkpoint's weights to the names and shapes that the host detects.

    Args:
        state_dict: is changed. Names that no known converter has changed stay.
        lazy: see `from_diffusers`.
    """
    return detect_keys(state_dict, lazy)[0]


def detect_keys(state_dict: dict[str, torch.Tensor],
                lazy: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Returns `to_comfy_keys`, and the `unet_config` that the host detects, None if none."""
    state_dict = _without_wrappers(complete_endings(state_dict))
    state_dict = unmerge_kernels(_undo_converters(state_dict))
    config = _detect(state_dict)
    if config is None:
        state_dict = from_diffusers(state_dict, lazy)
        config = _detect(state_dict)
    return _with_leading_ones(state_dict, config)


ENDINGS = ("weight", "bias", "scale")
LONGEST_CUT = 63  # characters that ggml keeps of a name


def is_cut(name: str) -> bool:
    """Returns whether the last part of a name was cut, as by stable-diffusion.cpp."""
    return len(name) == LONGEST_CUT and _ending(name) is not None


def _ending(name: str) -> str | None:
    """Returns what the last part of a name begins, None where it is none of ENDINGS cut short.

    Nothing after the number of a layer is a weight: a bias beside it would have the same name.
    """
    *_, before, last = ("", *name.rsplit(".", 2))
    return next((ending for ending in ENDINGS if (last or before.isdigit())
                 and ending.startswith(last) and ending != last), None)


def complete_endings(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives the last parts of names that were cut their ends again, by which the host detects.

    What is cut before its last part, `LoadCheck` completes by the names of the model.
    """
    return {f"{name.rpartition('.')[0]}.{_ending(name)}" if is_cut(name) else name: tensor
            for name, tensor in state_dict.items()}


def has_foreign_names(state_dict: dict[str, torch.Tensor]) -> bool:
    """Returns whether the names are not the host's own, such as diffusers'."""
    return _detect(_without_wrappers(state_dict)) is None


def _detect(state_dict: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    return try_detect(detect_unet_config, state_dict, model_prefix(state_dict))


def model_prefix(state_dict: dict[str, torch.Tensor]) -> str:
    """Returns the prefix of the model's names in a checkpoint, "" in a file of a model alone.

    For the latter the host's checkpoint loader drops custom operations.
    """
    prefix = unet_prefix_from_state_dict(state_dict)
    return prefix if sum(name.startswith(prefix) for name in state_dict) > 5 else ""


def _wrapper(names: Iterable[str]) -> str:
    names = [name for name in names if "." in name]  # without markers
    match = WRAPPERS.match(names[0]) if names else None
    return match[0] if match and all(name.startswith(match[0]) for name in names) else ""


def _without_wrappers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strips prefixes that all names of a model have, also behind the prefix of a checkpoint's
    model, until the host knows the rest or none is left."""
    while True:
        outer = model_prefix(state_dict)
        wrapper = _wrapper(name.removeprefix(outer) for name in state_dict
                           if name.startswith(outer))
        if not wrapper or try_detect(detect_unet_config, state_dict, outer) is not None:
            return state_dict
        wrapped = outer + wrapper
        state_dict = {outer + name.removeprefix(wrapped) if name.startswith(wrapped) else name:
                      tensor for name, tensor in state_dict.items()}


def unmerge_kernels(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits rows and input channels of kernels of five dimensions, which C programs merge.

    The kernel has as many rows as its bias has values; a layer with another kernel, such as a
    transposed one, merges them again.

    Args:
        state_dict: is changed.
    """
    for name, tensor in list(state_dict.items()):
        bias = state_dict.get(name.removesuffix("weight") + "bias")
        if (name.endswith(".weight") and tensor.ndim == 4
                and bias is not None and bias.ndim == 1 and len(bias)):
            rows, rest = divmod(len(tensor), len(bias))
            if rows > 1 and not rest:
                state_dict[name] = _reshaped(tensor, (len(bias), rows, *tensor.shape[1:]))
    return state_dict


def _with_leading_ones(
        state_dict: dict[str, torch.Tensor],
        config: dict[str, Any] | None) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Gives weights such as position embeddings the leading one that C programs drop, where the
    host detects the right model only so. Takes and returns what it detects too."""
    loose = {name: _reshaped(tensor, (1, *tensor.shape)) for name, tensor in state_dict.items()
             if len(tensor.shape) == 2 and not name.endswith((".weight", ".bias"))}
    if config is not None and not loose:
        return state_dict, config
    prefix = model_prefix(state_dict)
    restored = _LastRead(state_dict | loose)
    detected = try_detect(detect_unet_config, restored, prefix)
    while detected is None and (tensor := restored.get(restored.last)) is not None:
        if len(tensor.shape) != 1:  # the host does not fail for its missing dimension
            return state_dict, config
        restored[restored.last] = _reshaped(tensor, (1, *tensor.shape))
        detected = try_detect(detect_unet_config, restored, prefix)
    if detected not in (config, None) and (
            config is None or _unfit(restored, prefix) < _unfit(state_dict, prefix)):
        return dict(restored), detected
    return state_dict, config


class _LastRead(dict):
    """A state dict that remembers the name that was read last."""

    last = ""

    def __getitem__(self, name):
        self.last = name
        return super().__getitem__(name)


def _unfit(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    """Returns how many weights of the model that the host detects are of other sizes."""
    config = try_detect(model_config_from_unet, state_dict, prefix)
    model = config and try_detect(config.get_model, state_dict, prefix, device="meta")
    if not model:
        return len(state_dict)
    sizes = {f"{prefix}{name}": weight.numel()
             for name, weight in model.diffusion_model.state_dict().items()}
    return sum(sizes.get(name, tensor.shape.numel()) != tensor.shape.numel()
               for name, tensor in state_dict.items())


def _undo_converters(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reverts the names and shapes that converters are known to change."""
    for name, tensor in list(state_dict.items()):
        # Some name the weight of a query or key norm `.scale`; the host expects `.weight`.
        if re.search(r"(query|key|_q|_k|\.q|\.k)_norm\.scale$", name):
            state_dict[name.removesuffix("scale") + "weight"] = state_dict.pop(name)
        # stable-diffusion.cpp stores linear projections of SDXL and SD2 as 1x1 convolutions, which
        # only SD1 has.
        elif re.search(r"\.proj_(in|out)\.weight$", name) and tensor.shape[2:] == (1, 1):
            context = state_dict.get(
                re.sub(r"proj_(in|out)\.weight$", "transformer_blocks.0.attn2.to_k.weight", name))
            if context is not None and context.shape[1] != 768:
                state_dict[name] = _reshaped(tensor, tensor.shape[:2])
    return state_dict


def _reshaped(tensor: torch.Tensor, shape) -> torch.Tensor:
    return relabel(tensor, shape=shape) if is_packed(tensor) else tensor.reshape(shape)
