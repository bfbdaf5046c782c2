"""Names the one weight without which the host does not know a model."""
from collections.abc import Iterator

import comfy.model_detection
import torch

from .detection import try_detect
from .diffusers_keys import from_diffusers

WIDTH = 256  # of a weight whose shape nothing says
MOST_TENSORS = 10_000  # of a file that is looked at, each time with another name
MOST_MISSING = 0.1  # of a model's names may be missing besides
ENDINGS = ("weight", "scale")
# the host's functions that look names up
DETECTION = (comfy.model_detection.detect_unet_config,
             comfy.model_detection.convert_diffusers_mmdit)


def find_deciding_weight(state_dict: dict[str, torch.Tensor], prefix: str) -> str | None:
    """Returns the weight with which the host would know a model, None where there is none.

    Args:
        state_dict: in which the host detects no model; only names and shapes matter.
        prefix: of the model's names.
    """
    names = dict.fromkeys(_names_in_detection()) if len(state_dict) < MOST_TENSORS else ()
    # on one device, where rows are joined; the host reads values of some vectors
    state_dict = {name: tensor if len(tensor.shape) < 2 else torch.empty(
        tensor.shape, dtype=torch.float32, device="meta") for name, tensor in state_dict.items()}
    for name in names:
        if f"{prefix}{name}" in state_dict:
            continue
        layer = f"{prefix}{name.rpartition('.')[0]}"
        bias = state_dict.get(f"{layer}.bias")
        shape = (WIDTH if bias is None else len(bias), WIDTH)
        completed = {**state_dict, f"{prefix}{name}": torch.empty(shape, dtype=torch.float32,
                                                                  device="meta")}
        if _fits(completed if prefix else from_diffusers(completed), prefix):
            return f"{prefix}{name}"
    return None


def _names_in_detection() -> Iterator[str]:
    """Yields the names of weights that are written in the host's detection."""
    codes = [function.__code__ for function in DETECTION]
    for code in codes:
        for value in code.co_consts:
            if hasattr(value, "co_consts"):
                codes.append(value)
            elif isinstance(value, str) and "." in value and " " not in value:
                name = value.replace("{}", "", value.startswith("{}"))
                yield from [name + ending for ending in ENDINGS] if name.endswith(".") else [name]


def _fits(state_dict: dict[str, torch.Tensor], prefix: str) -> bool:
    """Returns whether the host knows a model of these names and has hardly any others for it."""
    config = try_detect(comfy.model_detection.model_config_from_unet, state_dict, prefix)
    model = config and try_detect(config.get_model, state_dict, prefix, device="meta")
    if not model:
        return False
    wanted = {f"{prefix}{name}" for name in model.diffusion_model.state_dict()}
    return len(wanted - state_dict.keys()) <= MOST_MISSING * len(wanted)
