"""What a text encoder sees and hears through, where no file of it was given: left out of the host's
model.

The host builds these towers whether a file has them or not. Gemma 3 12B, which LTX-2 uses for text
alone, would hold 1.6 GB for one that cannot work.
"""
import contextlib
import os
from collections.abc import Sequence

import torch

from ...ops.load_hooks import before_each_load
from ..files.container import WeightFileError

# the host's names
TOWERS = {"vision_model", "multi_modal_projector", "audio_model", "audio_projector", "visual"}


class MissingTower(torch.nn.Module):
    """A module in the place of a tower, whose use raises a WeightFileError about the missing
    file."""

    def __init__(self, names: str):
        super().__init__()
        self.names = names

    def forward(self, *args, **kwargs):
        raise WeightFileError(
            f"{self.names} came without the part that sees or hears (mmproj), so no picture or"
            " sound can be shown to it. Pick the mmproj file that was published with it in Load"
            " Text Encoder (Featherweight), or put it beside this file."
        )

    # what the host calls first where there is no tower but an embedding of pixels
    patchify = forward


def placeholder(*shape: int) -> torch.Tensor:
    """A tensor without memory of its own, put among an encoder's weights because the host tells the
    encoder by its shape."""
    return torch.zeros(1, dtype=torch.float32).expand(shape)


def is_placeholder(tensor: torch.Tensor) -> bool:
    return 0 in tensor.stride()


def omit_missing_towers(paths: Sequence[str]) -> contextlib.AbstractContextManager:
    """A context in which the host builds and loads a text encoder of these files without the towers
    that they do not hold."""
    names = " and ".join(map(os.path.basename, paths))

    def leave_out(model, state_dict, prefix, *args):
        for name in TOWERS & {name for name, _ in model.named_children()}:
            parts = {
                key: tensor for key, tensor in state_dict.items()
                if key.startswith(f"{prefix}{name}.")
            }
            if all(map(is_placeholder, parts.values())):
                setattr(model, name, MissingTower(names))
                for key in parts:
                    del state_dict[key]

    return before_each_load(lambda name, module: name == "transformer", leave_out)
