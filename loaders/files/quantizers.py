"""Quantisers of the Hugging Face libraries whose weights become packed tensors while they are read.

Each is a module with `NAME`, `layers`, which yields the layers that it packed by names of
tensors, and `join`, which replaces the parts of each weight with a packed tensor `L.weight`.
"""
from collections.abc import Collection

import torch

from . import compressed_tensors, gptq, quanto, torchao
from .container import WeightFile

MODULES = (gptq, compressed_tensors, quanto, torchao)
# the name of a quantiser in the config of a folder -> for people, where that is not the module's
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "intel/auto-round": "AutoRound"}


def has_quantized_weights(names: Collection[str]) -> bool:
    """Returns whether a file with tensors of these names has weights that one of them packed."""
    names = dict.fromkeys(names)
    return any(next(module.layers(names), None) is not None for module in MODULES)


def quantizer_of(file: WeightFile) -> str:
    """Returns which of them packed weights of a file, "" if none did."""
    for module in MODULES:
        if next(module.layers(file.entries), None) is not None:
            return NAMES.get(str(file.quantization.get("quant_method")), module.NAME)
    return ""


def join_quantized_weights(file: WeightFile,
                           tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replaces the parts of each weight that one of them packed with one packed tensor.

    Args:
        file: the file they come from.
        tensors: name -> tensor as stored; changed in place.

    Returns:
        `tensors`.

    Raises:
        WeightFileError: the parts of a weight do not belong together.
    """
    for module in MODULES:
        module.join(file, tensors)
    return tensors
