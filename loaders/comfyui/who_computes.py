"""Chooses who computes layers in ComfyUI's own quantised formats: this pack or ComfyUI.

ComfyUI multiplies them with its kernels, which quantise the input of a layer too. This pack
multiplies by the values that a format defines, on every device.
"""
import torch
from comfy.quant_ops import QUANT_ALGOS

from ..quantizers.comfyui import READERS

AUTOMATIC = "automatic"
EXACT = "exact, from the file's weights"
AS_COMFYUI = "as ComfyUI computes them"
HOST_FORMATS = (AUTOMATIC, EXACT, AS_COMFYUI)  # options of the loaders' input `host formats`

# Least compute capability of an NVIDIA GPU on which ComfyUI multiplies a format without converting
# its weights first; of others int8's, whose product fails on some older ones.
CAPABILITIES = {"float8_e4m3fn": (8, 9), "float8_e5m2": (8, 9), "nvfp4": (10, 0), "mxfp8": (10, 0)}
INT8_CAPABILITY = (8, 0)


def packed_formats(host_formats: str, device: torch.device) -> frozenset[str]:
    """Returns the names of ComfyUI's formats whose layers this pack computes.

    Args:
        host_formats: one of `HOST_FORMATS`.
        device: where the layers run.
    """
    if host_formats == AS_COMFYUI:
        return frozenset()
    return frozenset(name for name in READERS
                     if host_formats == EXACT or not host_multiplies(name, device))


def host_multiplies(name: str, device: torch.device) -> bool:
    """Returns whether ComfyUI has a product for a format on a device."""
    return (
        name in QUANT_ALGOS
        and device.type == "cuda"
        and torch.version.cuda is not None  # not AMD's
        and torch.cuda.get_device_capability(device) >= CAPABILITIES.get(name, INT8_CAPABILITY)
    )
