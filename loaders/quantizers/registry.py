"""The quantisers whose weights become packed tensors while files are read, in this order."""
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..files.container import ProgressIter, WeightFile
from . import (
    bitsandbytes,
    compressed_tensors,
    gptq,
    leftover_scales,
    nunchaku,
    quanto,
    scaled_weights,
    sdnq,
    torchao,
)
from .base import TypeOf
from .comfyui_marks import marked_layers
from .unsupported_quantizers import reject_unsupported_quantizers

QUANTIZERS = (
    bitsandbytes.QUANTIZER, nunchaku.QUANTIZER, gptq.QUANTIZER, compressed_tensors.QUANTIZER,
    quanto.QUANTIZER, torchao.QUANTIZER, scaled_weights.QUANTIZER, sdnq.QUANTIZER,
    leftover_scales.QUANTIZER,
)
# `quant_method` of a config -> who quantised by it, for people
METHODS = {method: who for quantizer in QUANTIZERS for method, who in quantizer.methods.items()}
COMFYUI = "ComfyUI's own formats"


def has_quantized_weights(names: Collection[str], metadata: Mapping[str, Any],
                          type_of: TypeOf) -> bool:
    """Returns whether a file has weights of one of the quantisers; see `Quantizer.is_in`."""
    names = dict.fromkeys(names)  # each is looked up for many others
    return any(quantizer.is_in(names, metadata, type_of) for quantizer in QUANTIZERS)


def quantizer_of(file: WeightFile) -> str:
    """Returns who quantised weights of a file, by its config where that says so, "" for nobody."""

    def type_of(name: str) -> str:
        return file.entries[name].format

    for quantizer in QUANTIZERS:
        if quantizer.is_in(file.entries, file.metadata, type_of):
            return METHODS.get(str(file.quantization.get("quant_method")), quantizer.name)
    return COMFYUI if marked_layers(file.metadata, file.entries) else ""


def join_quantized_weights(file: WeightFile, tensors: dict[str, torch.Tensor],
                           track: ProgressIter = iter):
    """Replaces the parts of each weight that a quantiser packed with one packed tensor `L.weight`.

    Args:
        file: the file they come from. What it marks as ComfyUI's stays as it is.
        tensors: name -> tensor as stored; changed in place.
        track: iterates over names and shows progress.

    Raises:
        WeightFileError: the parts of a weight do not belong together, or a quantiser is not
            supported.
    """
    # progress has one stage for all: bitsandbytes' reader goes through the names of any file
    tracked = nunchaku if nunchaku.has_nunchaku_weights(tensors) else bitsandbytes
    for quantizer in QUANTIZERS:
        quantizer.join(file, tensors, track if quantizer is tracked.QUANTIZER else iter)
    reject_unsupported_quantizers(file, tensors)
