"""Quantisers of the Hugging Face libraries whose weights become packed tensors while they are read.

Each is a module with `layers`, which yields the layers that it packed by names of tensors, and
`join`, which replaces the parts of each weight with a packed tensor `L.weight`.
"""
from collections.abc import Collection

import torch

from . import compressed_tensors, gptq, quanto, torchao
from .container import WeightFile

MODULES = (gptq, compressed_tensors, quanto, torchao)


def has_quantized_weights(names: Collection[str]) -> bool:
    """Returns whether a file with tensors of these names has weights that one of them packed."""
    names = dict.fromkeys(names)
    return any(next(module.layers(names), None) is not None for module in MODULES)


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
