"""Devices by the names that nodes offer and workflows bring from other machines."""
import re

import comfy.model_management
import torch

from .files.container import display_name

DEFAULT = "default"
CPU = torch.device("cpu")

# gpu:1 as the host's selectors name it, and torch's own names, which other packs offer. A name
# without a number is the first.
GPU = re.compile(r"(?:gpu|cuda|xpu|npu|mlu|mps|directml|corex)(?::([0-9]{1,4}))?")


def gpus() -> list[torch.device]:
    """Those of this machine that the host computes on, in its order."""
    return [
        device for device in comfy.model_management.get_all_torch_devices() if device.type != "cpu"
    ]


def device_choices() -> list[str]:
    """What the host's own selectors offer: default, cpu and, where there are several GPUs, gpu:0,
    gpu:1 ..."""
    return comfy.model_management.get_gpu_device_options()


def find_device(name: str | None,
                instead: str = "the default one") -> tuple[torch.device | None, str | None]:
    """(device, None) for a name as nodes offer it. The device None is the host's default, with a
    sentence for one not here.

    instead: what that sentence says is used.
    """
    if name in (DEFAULT, "", None):
        return None, None
    if name == "cpu":
        return CPU, None
    match, found = GPU.fullmatch(str(name)), gpus()
    if match and int(match[1] or 0) < len(found):
        return found[int(match[1] or 0)], None
    there = ", ".join([*(f"gpu:{number}" for number in range(len(found))), "cpu"])
    return None, f"There is no device {display_name(str(name))} here (found: {there}), so {instead} is used."


def device_options(device: torch.device | None) -> dict[str, torch.device]:
    """The host's `model_options` for a model that is to run on a device; on the CPU it stays there
    between runs too."""
    if device is None:
        return {}
    return (
        {"load_device": device, "offload_device": device}
        if device == CPU
        else {"load_device": device}
    )
