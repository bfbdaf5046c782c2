"""Finds the model family of a set of layers by their names and shapes alone.

One table serves LoRAs (layers and the shapes that their factors make) and models (weights), so that
the two can be compared: `layers` and `models` of each family in `families.py`.
"""
import collections
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..families import FAMILIES, Family
from .model_blocks import WRAPPERS

HINT_KEYS = (
    "ss_base_model_version",
    "modelspec.architecture",
    "ss_sd_model_name",
    "base_model",
    "general.architecture",
)


@dataclass(frozen=True)
class FamilyMatch:
    """The models that layers may belong to, the likeliest first, and their width."""

    names: tuple[str, ...]
    width: int | None
    measure: str

    def __str__(self) -> str:
        return " or ".join(self.names) + (f" ({self.width} {self.measure})" if self.width else "")

    def shared(self, other: "FamilyMatch | None") -> "FamilyMatch | None":
        """Returns the models that both matches have, or None if there are none."""
        if other is None or (self.width and other.width and self.width != other.width):
            return None
        names = tuple(name for name in self.names if name in other.names)
        return FamilyMatch(names, self.width, self.measure) if names else None


def match_family(shapes: Mapping[str, tuple[int | None, int | None]],
                 metadata: Mapping[str, str] | None = None) -> FamilyMatch | None:
    """Finds the family that layers belong to.

    Args:
        shapes: layer name, in any usual spelling, -> (rows, columns); None where unknown.
        metadata: of the file; it decides only between families that the layers leave open.

    Returns:
        The models of the best family, or None if no family explains the layers.
    """
    layers = {WRAPPERS.sub("", name).replace(".", "_"): shape for name, shape in shapes.items()}
    fits = [_fit(family, layers) for family in FAMILIES if family.layers]
    best = max(fit.explained for fit in fits)
    # A few matching names prove nothing about a file of hundreds.
    if not best or best * 4 < len(layers):
        return None
    fits = [fit for fit in fits if fit.explained == best]
    candidates = [
        (model, fit) for fit in fits for model in fit.family.models
        if fit.width in (model.width, None)
        and all(not limit or count <= limit for count, limit in zip(fit.depth, model.depth))
    ]
    exact = [(model, fit) for model, fit in candidates if fit.depth == model.depth]
    candidates = exact or candidates
    hints = metadata_hints(metadata or {}).lower()
    candidates = [(model, fit) for model, fit in candidates
                  if re.search(model.hint, hints)] or candidates
    _, fit = candidates[0] if candidates else (None, fits[0])
    names = [model.name for model, _ in candidates] or [fit.family.name for fit in fits]
    return FamilyMatch(tuple(names), fit.width, fit.family.measure)


class _Fit(NamedTuple):
    """How well a family explains layers.

    Attributes:
        family: the family.
        explained: number of layers that it accounts for with one width.
        width: that width; None if no layer shows it.
        depth: largest number of a block and of a single block, plus 1.
    """
    family: Family
    explained: int
    width: int | None
    depth: tuple[int, int]


def _fit(family: Family, shapes: Mapping[str, tuple[int | None, int | None]]) -> _Fit:
    widths = collections.Counter()
    without_width = 0
    depth = {"block": 0, "single": 0}
    pieces = [(re.compile(pattern), multiples) for pattern, multiples in family.layers.items()]
    for name, shape in shapes.items():
        match, multiples = next(
            ((match, size) for pattern, size in pieces if (match := pattern.fullmatch(name))),
            (None, ()))
        if match is None:
            continue
        measured = {
            size / multiple for size, multiple in zip(shape, multiples) if multiple and size
        }
        if not measured:
            without_width += 1
        elif len(measured) == 1:
            widths[measured.pop()] += 1
        for group, number in match.groupdict().items():
            if number:
                depth[group] = max(depth[group], int(number) + 1)
    counts = depth["block"], depth["single"]
    if not widths:
        return _Fit(family, without_width, None, counts)
    width, count = widths.most_common(1)[0]
    return _Fit(family, without_width + count, int(width), counts)


def metadata_hints(metadata: Mapping[str, str]) -> str:
    """Returns what a file's metadata says about its model; "" if it says nothing."""
    return ", ".join(dict.fromkeys(str(metadata[key]) for key in HINT_KEYS if metadata.get(key)))
