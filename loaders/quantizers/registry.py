"""Quantisers of the Hugging Face libraries whose weights become packed tensors while they are read.

Each is a module with `NAME`, the `PARTS` of a weight behind the name of its layer, `LAYERS`, a part
that tells a layer -> the parts that it must have besides, and `read_weight`, which makes one packed
tensor of a layer's parts.
"""
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType

import torch

from ..files.container import WeightFile, safe_repr
from ..name_lists import join_some
from . import compressed_tensors, gptq, quanto, torchao
from .comfyui import PartError, Parts
from .comfyui_marks import marked_layers

MODULES = (gptq, compressed_tensors, quanto, torchao)
# the name of a quantiser in the config of a folder -> for people, where that is not the module's
NAMES = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "intel/auto-round": "AutoRound"}


def has_quantized_weights(names: Iterable[str]) -> bool:
    """Returns whether a file with tensors of these names has weights that one of them packed."""
    names = dict.fromkeys(names)
    return any(next(layers_of(module, names), None) is not None for module in MODULES)


def layers_of(module: ModuleType, names: Collection[str]) -> Iterator[str]:
    """Yields the layers of a file that one of them packed, by the names of its tensors."""
    for name in names:
        for ending, others in module.LAYERS.items():
            layer = name.removesuffix(f".{ending}")
            if layer != name and all(f"{layer}.{other}" in names for other in others):
                yield layer


def quantizer_of(file: WeightFile) -> str:
    """Returns which of them packed weights of a file, "" if none did."""
    for module in MODULES:
        if next(layers_of(module, file.entries), None) is not None:
            method = str(file.quantization.get("quant_method"))
            return NAMES.get(method) or module.NAME
    return ""


def join_quantized_weights(file: WeightFile, tensors: dict[str, torch.Tensor]):
    """Replaces the parts of each weight that one of them packed with one packed tensor `L.weight`.

    Args:
        file: the file they come from. What it marks as ComfyUI's stays as it is.
        tensors: name -> tensor as stored; changed in place.

    Raises:
        WeightFileError: the parts of a weight do not belong together.
    """
    marked = marked_layers(file.metadata, tensors)
    for module in MODULES:
        layers = [*layers_of(module, tensors.keys())]
        if module is compressed_tensors:
            layers += module.layers_of_int8(tensors)
        parts_of = {}
        for layer in dict.fromkeys(layers):
            if layer not in marked:
                parts = {name: tensors.pop(f"{layer}.{name}") for name in module.PARTS
                         if f"{layer}.{name}" in tensors}
                parts_of[layer] = parts.keys()
                tensors[f"{layer}.weight"] = _read_weight(module, file, layer, parts)
        _tell_of_missing_parts(file, module.NAME, parts_of)


def _tell_of_missing_parts(file: WeightFile, quantizer: str,
                           parts_of: Mapping[str, Collection[str]]):
    """Notes layers without a part that most others have, and that their quantiser may leave out."""
    counts = Counter(part for parts in parts_of.values() for part in parts)
    for part, count in counts.items():
        layers = [layer for layer, parts in parts_of.items() if part not in parts]
        if layers and 2 * count > len(parts_of):
            file.note(f"{file.path.name}: {join_some(map(safe_repr, layers))}, packed by"
                      f" {quantizer}, {'have' if layers[1:] else 'has'} no {part}, as other layers"
                      " have.")


def _read_weight(module: ModuleType, file: WeightFile, layer: str, parts: Parts) -> torch.Tensor:
    try:
        return module.read_weight(file, layer, parts)
    except PartError as error:
        name = next((name for name in file.entries if name.startswith(f"{layer}.")), layer)
        raise file.error_at(name, f"{safe_repr(layer)}, packed by {module.NAME}: {error}",
                            error.advice) from error
