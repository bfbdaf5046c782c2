"""Converts names and shapes of a model's weights from a file's to the host's."""
import re

import torch
from comfy.model_detection import unet_prefix_from_state_dict

from ..ops.packed_layout import is_packed, relabel
from .diffusers_keys import from_diffusers


def to_comfy_keys(state_dict: dict[str, torch.Tensor],
                  lazy: bool = False) -> dict[str, torch.Tensor]:
    """Converts a model's or checkpoint's weights to the names and shapes that the host detects.

    Args:
        state_dict: is changed. Names that no known converter has changed stay.
        lazy: see `from_diffusers`.
    """
    return from_diffusers(_undo_converters(state_dict), lazy)


def model_prefix(state_dict: dict[str, torch.Tensor]) -> str:
    """Returns the prefix of the model's names in a checkpoint, "" in a file of a model alone.

    For the latter the host's checkpoint loader drops custom operations.
    """
    prefix = unet_prefix_from_state_dict(state_dict)
    return prefix if sum(name.startswith(prefix) for name in state_dict) > 5 else ""


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
        # It also merges the first two of the five dimensions of a video model's first convolution.
        elif re.search(r"(patch_embedding\w*|img_in(\.proj)?)\.weight$", name) and tensor.ndim == 4:
            bias = state_dict.get(name.removesuffix("weight") + "bias")
            if (
                bias is not None
                and tensor.shape[0] > bias.shape[0]
                and tensor.shape[0] % bias.shape[0] == 0
            ):
                state_dict[name] = _reshaped(
                    tensor, (bias.shape[0], tensor.shape[0] // bias.shape[0], *tensor.shape[1:]))
    return state_dict


def _reshaped(tensor: torch.Tensor, shape) -> torch.Tensor:
    return relabel(tensor, shape=shape) if is_packed(tensor) else tensor.reshape(shape)
