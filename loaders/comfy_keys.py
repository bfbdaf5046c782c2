"""Names and shapes of a model's weights as files have them -> as the host knows them."""
import re

import torch
from comfy.model_detection import unet_prefix_from_state_dict

from ..ops.packed_layout import is_packed, relabel
from .diffusers_keys import from_diffusers


def to_comfy_keys(state_dict: dict[str, torch.Tensor],
                  later: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model or a whole checkpoint under the names and in the shapes that the
    host's detection reads.

    Changes `state_dict`. Names that no converter is known to have changed stay. later: see
    `from_diffusers`.
    """
    return from_diffusers(_undo_converters(state_dict), later)


def model_prefix(state_dict: dict[str, torch.Tensor]) -> str:
    """Return what the names of a checkpoint's model begin with.

    "" in a file of a model alone, for which the host drops operations.
    """
    prefix = unet_prefix_from_state_dict(state_dict)
    return prefix if sum(name.startswith(prefix) for name in state_dict) > 5 else ""


def _undo_converters(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo what converters changed in names and shapes that the host's detection reads."""
    for name, tensor in list(state_dict.items()):
        # Some conversions name the scale of a query or key norm `.scale` where the host wants
        # `.weight`.
        if re.search(r"(query|key|_q|_k|\.q|\.k)_norm\.scale$", name):
            state_dict[name.removesuffix("scale") + "weight"] = state_dict.pop(name)
        # stable-diffusion.cpp keeps SDXL's and SD2's linear projections as 1x1 convolutions; only
        # SD1 has those.
        elif re.search(r"\.proj_(in|out)\.weight$", name) and tensor.shape[2:] == (1, 1):
            context = state_dict.get(
                re.sub(r"proj_(in|out)\.weight$", "transformer_blocks.0.attn2.to_k.weight", name))
            if context is not None and context.shape[1] != 768:
                state_dict[name] = _reshaped(tensor, tensor.shape[:2])
        # It also folds the first two of five dimensions of the video models' first convolution into
        # one.
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
