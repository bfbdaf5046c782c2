"""What a quantiser's module offers, a `Quantizer`, and the one loop that reads their weights."""
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...ops.formats.base import FormatError
from ..container.weight_file import ProgressIter, WeightFile, safe_repr
from ..name_lists import join_some
from .comfy_quant_marks import MARK, marked_layers
from .parts import GET_OTHER_CONVERSION, Part, PartError, Parts, as_comparable, bind_sizes


class TensorHeader(NamedTuple):
    """The dtype, None for one that is not read, and the shape of a tensor that is not opened."""
    dtype: torch.dtype | None
    shape: tuple[int, ...]


# Returns a tensor of a file by its name, or its header: only dtype and shape are looked at.
HeaderOf = Callable[[str], Any]
Find = Callable[[Collection[str], Mapping[str, Any], HeaderOf], Iterable[str]]


@dataclass
class Layer:
    """The parts of one weight.

    Attributes:
        file: where they come from.
        name: what the names of all parts begin with.
        parts: the parts that the file has, by their names in the layouts.
        names: of the same parts in the file.
        layout: the name of its layout.
        sizes: those that the shapes of the layout name.
    """
    file: WeightFile
    name: str
    parts: Parts
    names: dict[str, str]
    layout: str = ""
    sizes: dict[str, int] = field(default_factory=dict)


# What a layer becomes: its weight, or several tensors by their whole names.
Read = Callable[[Layer], torch.Tensor | Mapping[str, torch.Tensor]]
Session = Callable[[WeightFile, dict[str, torch.Tensor]], AbstractContextManager[Read]]


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """How the files of one quantiser, or of several that store weights alike, are read.

    Attributes:
        name: for people.
        methods: `quant_method` of a config -> who quantised by it, for people.
        find: find(names, metadata, header_of): returns the layers that have such weights, or that
            lack parts of them. names: of the tensors of a file. metadata: of the file.
        layouts: name, for people -> the parts of a weight, behind the name of its layer.
        layout: returns the name of a layer's layout; by default it is the first. May raise
            PartError.
        read: returns what the parts of a layer, which are those of its layout, become. Raises
            PartError where their values do not belong together.
        session: in place of `read`, for what concerns all layers of a file: session(file, tensors)
            is a context in which the layers are read, and gives the function that reads one. It
            sees the tensors before the first layer and after the last one.
        leftovers: matches names of parts that remain where others are missing.
        is_uniform: whether a layer without an optional part that most others have is noted.
        in_file: whether the parts are joined as the file is read; otherwise `loaders.comfyui` reads
            them later, or leaves them to ComfyUI.
    """
    name: str
    methods: Mapping[str, str] = field(default_factory=dict)
    find: Find
    layouts: Mapping[str, Mapping[str, Part]]
    layout: Callable[[Layer], str] | None = None
    read: Read | None = None
    session: Session | None = None
    leftovers: re.Pattern[str] | None = None
    is_uniform: bool = False
    in_file: bool = True

    def reading(self, file: WeightFile,
                tensors: dict[str, torch.Tensor]) -> AbstractContextManager[Read]:
        """Returns `session`, or a context that gives `read`."""
        if self.session is not None:
            return self.session(file, tensors)
        assert self.read is not None
        return nullcontext(self.read)

    def finds(self, names: Collection[str], metadata: Mapping[str, Any],
              header_of: HeaderOf) -> bool:
        """Returns whether a file has layers of this quantiser; see `find`."""
        return next(iter(self.find(names, metadata, header_of)), None) is not None


def layers_with(*endings: Collection[str]) -> Find:
    """Returns a `Quantizer.find` for layers that are not marked as ComfyUI's.

    Args:
        endings: parts that tell a layer together; any of these collections does.
    """

    def layers_of(names: Collection[str]) -> Iterator[str]:
        for first, *others in endings:
            for name in names:
                layer = name.removesuffix(f".{first}")
                if layer != name and all(f"{layer}.{other}" in names for other in others):
                    yield layer

    def find(names: Collection[str], metadata: Mapping[str, Any],
             header_of: HeaderOf) -> Iterator[str]:
        return without_marked(layers_of(names), metadata, names)

    return find


def without_marked(layers: Iterable[str], metadata: Mapping[str, Any],
                   names: Collection[str]) -> Iterator[str]:
    """Yields the layers that a file does not mark as ComfyUI's."""
    marked = None
    for layer in layers:
        marked = marked_layers(metadata, names) if marked is None else marked
        if layer not in marked:
            yield layer


def scaled_layers(names: Collection[str], ends: Iterable[str]) -> Iterator[str]:
    """Yields the layers with a weight and one of some parts that have no mark of ComfyUI's."""
    for name in names:
        layer, _, part = name.rpartition(".")
        if part in ends and f"{layer}.weight" in names and f"{layer}{MARK}" not in names:
            yield layer


def join_weights(quantizers: Iterable[Quantizer], file: WeightFile,
                 tensors: dict[str, torch.Tensor], track: ProgressIter = iter):
    """Replaces the parts of each weight that one of some quantisers packed with a packed tensor.

    Args:
        quantizers: each sees what those before it have left.
        file: where the tensors come from.
        tensors: name -> tensor as stored; changed in place.
        track: iterates over names and shows progress, once for all quantisers.

    Raises:
        WeightFileError: the parts of a weight do not belong together, or some are missing.
    """
    steps = iter(track(list(tensors)))
    for quantizer in quantizers:
        layers = dict.fromkeys(quantizer.find(tensors, file.metadata, tensors.__getitem__))
        if layers:
            _join_layers(quantizer, layers, file, tensors, steps)
    for _ in steps:
        pass
    for quantizer in quantizers:
        names = filter(quantizer.leftovers.search, tensors) if quantizer.leftovers else iter(())
        name = next(names, None)
        if name is not None:
            raise file.error_at(
                name, f"{safe_repr(name)} is part of a weight packed by {quantizer.name} whose"
                " other parts are missing", GET_OTHER_CONVERSION)


def _join_layers(quantizer: Quantizer, layers: Iterable[str], file: WeightFile,
                 tensors: dict[str, torch.Tensor], steps: Iterator):
    titles = {title: name for layout in quantizer.layouts.values() for name, part in layout.items()
              for title in (name, *part.other_names)}
    parts_of = {}
    with quantizer.reading(file, tensors) as read:
        for name in layers:
            layer = Layer(file, name, {}, {})
            try:
                for title, part in titles.items():
                    _take_part(layer, part, f"{name}.{title}" if title else name, tensors)
                parts_of[name] = layer.names.keys()
                for _ in zip(layer.names, steps):
                    pass
                layer.layout = quantizer.layout(layer) if quantizer.layout else next(
                    iter(quantizer.layouts))
                expected = quantizer.layouts[layer.layout]
                layer.sizes = bind_sizes(layer.parts, expected, {
                    part: whole[len(name) + 1:] for part, whole in layer.names.items() if part})
                layer.parts = as_comparable(layer.parts, expected)
                made = read(layer)
            except (PartError, FormatError) as error:
                first = next(iter(layer.names.values()), name)
                title = f" ({layer.layout})" if layer.layout and quantizer.layout else ""
                writer = getattr(error, "writer", "") or quantizer.name
                raise file.error_at(
                    first, f"{safe_repr(name)}, packed by {writer}{title}: {error}",
                    getattr(error, "advice", GET_OTHER_CONVERSION)) from error
            tensors |= {f"{name}.weight": made} if isinstance(made, torch.Tensor) else made
    if quantizer.is_uniform:
        _tell_of_missing_parts(file, quantizer.name, parts_of)


def _take_part(layer: Layer, part: str, name: str, tensors: dict[str, torch.Tensor]):
    """Moves a part of a layer out of `tensors`. Raises PartError if there are two of it."""
    if name not in tensors:
        return
    if part in layer.names:
        raise PartError(f"it has both {safe_repr(layer.names[part])} and {safe_repr(name)}")
    layer.names[part], layer.parts[part] = name, tensors.pop(name)


def _tell_of_missing_parts(file: WeightFile, quantizer: str,
                           parts_of: Mapping[str, Collection[str]]):
    """Notes layers without a part that most others have, and that their quantiser may leave out."""
    counts = Counter(each for parts in parts_of.values() for each in parts)
    for each, count in counts.items():
        layers = [layer for layer, parts in parts_of.items() if each not in parts]
        if layers and 2 * count > len(parts_of):
            file.note(f"{file.name}: {join_some(map(safe_repr, layers))}, packed by"
                      f" {quantizer}, {'have' if layers[1:] else 'has'} no {each}, as other layers"
                      " have.")
