"""The quantisers whose weights become packed tensors while files are read, in this order."""
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..container.weight_file import ProgressIter, WeightFile
from ..refusals.unsupported_quantizers import (
    find_unsupported_quantizer,
    reject_unsupported_quantizers,
)
from . import (
    bitsandbytes,
    comfy_quant,
    compressed_tensors,
    gptq,
    hqq,
    leftover_scales,
    mlx,
    nunchaku,
    quanto,
    scaled_weights,
    sdnq,
    torchao,
)
from .base import HeaderOf, TensorHeader, join_weights
from .judgement import judged
from .lost_marks import restore_marks

QUANTIZERS = (
    bitsandbytes.QUANTIZER, nunchaku.QUANTIZER, gptq.QUANTIZER, compressed_tensors.QUANTIZER,
    mlx.QUANTIZER, quanto.QUANTIZER, hqq.QUANTIZER, torchao.QUANTIZER,
    scaled_weights.QUANTIZER, sdnq.QUANTIZER, leftover_scales.QUANTIZER, comfy_quant.QUANTIZER,
)
# `quant_method` of a config -> who quantised by it, for people
METHODS = {method: who for quantizer in QUANTIZERS for method, who in quantizer.methods.items()}
FILE_QUANTIZERS = tuple(quantizer for quantizer in QUANTIZERS if quantizer.in_file)


def has_quantized_weights(names: Collection[str], metadata: Mapping[str, Any],
                          header_of: HeaderOf) -> bool:
    """Returns whether a quantiser, but ComfyUI, packed weights, supported or not; see
    `Quantizer.find`."""
    names = dict.fromkeys(names)  # each is looked up for many others
    return find_unsupported_quantizer(names) is not None or any(
        quantizer.finds(names, metadata, header_of) for quantizer in FILE_QUANTIZERS)


def quantizer_of(file: WeightFile) -> str:
    """Returns who quantised weights of a file, by its config where that says so, "" for nobody."""

    def header_of(name: str) -> TensorHeader:
        entry = file.entries[name]
        return TensorHeader(file.dtypes.get(entry.format), entry.shape)

    for quantizer in QUANTIZERS:
        if quantizer.finds(file.entries, file.metadata, header_of):
            return METHODS.get(str(file.quantization.get("quant_method")), quantizer.name)
    return ""


def join_quantized_weights(file: WeightFile, tensors: dict[str, torch.Tensor],
                           track: ProgressIter = iter):
    """Replaces the parts of each weight that a quantiser packed with one packed tensor.

    Args:
        file: the file they come from. What it marks as ComfyUI's stays as it is.
        tensors: name -> tensor as stored; changed in place.
        track: iterates over names and shows progress.

    Raises:
        WeightFileError: the parts of a weight do not belong together, or a quantiser is not
            supported.
    """
    with judged(file, tensors):
        restore_marks(file, tensors)
        join_weights(FILE_QUANTIZERS, file, tensors, track)
        reject_unsupported_quantizers(file, tensors)
