"""What a quantiser's module offers, a `Quantizer`, and what modules share of a weight's parts."""
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ops.pickle_names import short_error_name
from ..files.container import AGAIN, ProgressIter, WeightFile, safe_repr
from ..name_lists import join_some
from .comfyui_marks import MARK, marked_layers

Parts = dict[str, torch.Tensor]
TypeOf = Callable[[str], str]  # a tensor's type in safetensors, by its name


@short_error_name
class PartError(ValueError):
    """The parts of a weight do not belong together; the message is part of a sentence.

    Args:
        problem: what is wrong with them.
        advice: what to do.
    """

    def __init__(self, problem: str, advice: str = AGAIN):
        super().__init__(problem)
        self.advice = advice


def part(parts: Parts, name: str) -> torch.Tensor:
    """Returns a part of a weight. Raises PartError if the file lacks it."""
    if name not in parts:
        raise PartError(f"its {name} is missing")
    return parts[name]


def has_scaled_layers(names: Iterable[str], ends: Collection[str], types: Container[str],
                      type_of: TypeOf) -> bool:
    """Returns whether a file has weights of some types with scales.

    Args:
        names: of its tensors.
        ends: of the names of scales behind the layer's.
        types: safetensors types of the weights.
        type_of: returns the safetensors type of a tensor by its name.
    """
    names = dict.fromkeys(names)
    layers = filter(None, (layer_scaled_by(name, ends, names) for name in names))
    return any(type_of(f"{layer}.weight") in types for layer in layers)


def layer_scaled_by(name: str, ends: Iterable[str], names: Container[str]) -> str | None:
    """Returns the layer, not in one of ComfyUI's formats, that a tensor has the scales of.

    None for another tensor.
    """
    for end in ends:
        layer = name.removesuffix(end)
        if layer != name and f"{layer}.weight" in names and f"{layer}{MARK}" not in names:
            return layer
    return None


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How the files of one quantiser, or of several that store weights alike, are read.

    Attributes:
        name: for people.
        methods: `quant_method` of a config -> who quantised by it, for people.
        is_in: is_in(names, metadata, type_of): returns whether a file has such weights. names: of
            its tensors. metadata: of the file. type_of: returns the safetensors type of a tensor
            by its name.
        join: join(file, tensors, track): replaces the parts of each such weight in `tensors`, name
            -> tensor as stored, with one packed tensor `L.weight`; raises WeightFileError where
            they do not belong together. track: iterates over names and shows progress.
    """
    name: str
    methods: Mapping[str, str] = field(default_factory=dict)
    is_in: Callable[[Collection[str], Mapping[str, Any], TypeOf], bool]
    join: Callable[[WeightFile, dict[str, torch.Tensor], ProgressIter], None]


def of_layers(name: str, parts: Collection[str], layers: Mapping[str, Collection[str]],
              read_weight: Callable[[WeightFile, str, Parts], torch.Tensor],
              methods: Mapping[str, str],
              more_layers: Callable[[Mapping[str, torch.Tensor]], Iterable[str]] | None = None
              ) -> Quantizer:
    """Returns the quantiser of files in which each layer has parts of its own.

    Args:
        name: for people.
        parts: of a weight, behind the name of its layer.
        layers: a part that tells a layer -> the parts that it must have besides.
        read_weight: Makes one packed tensor of a layer's parts; raises PartError.
        methods: See `Quantizer`.
        more_layers: Returns further layers, which the dtypes of tensors tell.
    """

    def find(names: Collection[str]) -> Iterator[str]:
        for each in names:
            for ending, others in layers.items():
                layer = each.removesuffix(f".{ending}")
                if layer != each and all(f"{layer}.{other}" in names for other in others):
                    yield layer

    def is_in(names: Collection[str], metadata: Mapping[str, Any], type_of: TypeOf) -> bool:
        return next(find(names), None) is not None

    def join(file: WeightFile, tensors: dict[str, torch.Tensor], track: ProgressIter):
        found = [*find(tensors.keys()), *(more_layers(tensors) if more_layers else ())]
        marked, parts_of = marked_layers(file.metadata, tensors) if found else (), {}
        for layer in dict.fromkeys(found):
            if layer not in marked:
                own = {each: tensors.pop(f"{layer}.{each}") for each in parts
                       if f"{layer}.{each}" in tensors}
                parts_of[layer] = own.keys()
                tensors[f"{layer}.weight"] = read(file, layer, own)
        _tell_of_missing_parts(file, name, parts_of)

    def read(file: WeightFile, layer: str, own: Parts) -> torch.Tensor:
        try:
            return read_weight(file, layer, own)
        except PartError as error:
            first = next((each for each in file.entries if each.startswith(f"{layer}.")), layer)
            raise file.error_at(first, f"{safe_repr(layer)}, packed by {name}: {error}",
                                error.advice) from error

    return Quantizer(name=name, methods=methods, is_in=is_in, join=join)


def _tell_of_missing_parts(file: WeightFile, quantizer: str,
                           parts_of: Mapping[str, Collection[str]]):
    """Notes layers without a part that most others have, and that their quantiser may leave out."""
    counts = Counter(each for parts in parts_of.values() for each in parts)
    for each, count in counts.items():
        layers = [layer for layer, parts in parts_of.items() if each not in parts]
        if layers and 2 * count > len(parts_of):
            file.note(f"{file.path.name}: {join_some(map(safe_repr, layers))}, packed by"
                      f" {quantizer}, {'have' if layers[1:] else 'has'} no {each}, as other layers"
                      " have.")
