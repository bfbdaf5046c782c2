"""Leaves vision and audio towers out of the host's text encoder where no file holds them.

The host builds these towers whether a file has them or not. Gemma 3 12B, which LTX-2 uses for text
alone, would take 1.6 GB for a tower that cannot work.
"""
import contextlib
import os
from collections.abc import Sequence

import torch

from ...ops.layers.load_hooks import on_each_module
from ..container.weight_file import WeightFileError

# the host's names
TOWERS = {"vision_model", "multi_modal_projector", "audio_model", "audio_projector", "visual"}


class MissingTower(torch.nn.Module):
    """Takes the place of a tower and raises WeightFileError when it is used.

    names: of the encoder's files.
    """

    def __init__(self, names: str):
        super().__init__()
        self.names = names

    def forward(self, *args, **kwargs):
        raise WeightFileError(
            f"{self.names} has no vision or audio part (mmproj), so it cannot take images or"
            " sound. Pick the mmproj file that was published with it in Load Text"
            " Encoder (GGUF, Featherweight), or put it next to this file."
        )

    # What the host calls first on an encoder that embeds pixels and has no tower.
    patchify = forward


def placeholder(*shape: int) -> torch.Tensor:
    """Returns zeros without memory, for a weight by whose shape the host detects an encoder."""
    return torch.zeros(1, dtype=torch.float32).expand(shape)


def omit_missing_towers(paths: Sequence[str]) -> contextlib.AbstractContextManager:
    """Inside this block the host builds the encoder of these files without towers they lack."""
    names = " and ".join(map(os.path.basename, paths))

    def leave_out(model, state_dict, prefix, *args):
        for name in TOWERS & {name for name, _ in model.named_children()}:
            parts = {
                key: tensor for key, tensor in state_dict.items()
                if key.startswith(f"{prefix}{name}.")
            }
            if all(0 in tensor.stride() for tensor in parts.values()):  # of `placeholder`
                setattr(model, name, MissingTower(names))
                for key in parts:
                    del state_dict[key]

    return on_each_module(lambda name, module: name == "transformer",
                          lambda module: module.register_load_state_dict_pre_hook(leave_out))
