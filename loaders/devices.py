"""Finds devices by the names that nodes offer and that workflows from other machines contain."""
import re

import comfy.model_management
import torch

from .container.weight_file import display_name

DEFAULT = "default"
CPU = torch.device("cpu")

# gpu:1, as the host's selectors name a GPU, and torch's own names, which other packs offer. A name
# without a number means the first GPU.
GPU = re.compile(r"(?:gpu|cuda|xpu|npu|mlu|mps|directml|corex)(?::([0-9]{1,4}))?")


def gpus() -> list[torch.device]:
    """Returns the GPUs of this machine that the host computes on, in its order."""
    return [
        device for device in comfy.model_management.get_all_torch_devices() if device.type != "cpu"
    ]


def total_memory(device: torch.device) -> float:
    """Returns the bytes of a device's memory, as the host counts it."""
    return float(comfy.model_management.get_total_memory(device))  # pyright: ignore[reportArgumentType]


def device_choices() -> list[str]:
    """Returns what the host's own selectors offer: default, cpu and, for several GPUs, gpu:0 ..."""
    return comfy.model_management.get_gpu_device_options()


def find_device(name: str | None,
                fallback: str = "the default one") -> tuple[torch.device | None, str | None]:
    """Finds a device by the name that a node has for it.

    Args:
        name: such as "default", "cpu", "gpu:1" or "cuda:1".
        fallback: what the message says is used if there is no such device.

    Returns:
        (device, None), or (None, message) if there is no such device. The device None is the host's
        default.
    """
    if name in (DEFAULT, "", None):
        return None, None
    if name == "cpu":
        return CPU, None
    match, devices = GPU.fullmatch(str(name)), gpus()
    number = int(match[1] or 0) if match else len(devices)
    if number < len(devices):
        return devices[number], None
    names = ", ".join([*(f"gpu:{number}" for number in range(len(devices))), "cpu"])
    return None, (
        f"There is no device {display_name(str(name))} here (found: {names}), so {fallback} is"
        " used."
    )


def device_options(device: torch.device | None) -> dict[str, torch.device]:
    """Returns the host's `model_options` for a device; on the CPU they keep the model there between
    runs too."""
    if device is None:
        return {}
    if device == CPU:
        return {"load_device": device, "offload_device": device}
    return {"load_device": device}
