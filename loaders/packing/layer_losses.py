"""Reports what rounding costs each layer: dB of a weight's power over the power of its error."""
import math
import re

from ...ops.quantize.relative_error import RelativeError

WORST = 5  # layers that are named, and groups of layers of the same name in other blocks
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class LayerLosses:
    """Collects the errors of packed weights, from the samples that packing takes of each."""

    def __init__(self):
        self.decibels: dict[str, float] = {}
        self.groups: dict[str, RelativeError] = {}
        self.total = RelativeError()

    def add(self, name: str, measured: RelativeError):
        """Adds a packed weight without NaN; one without any error is left out."""
        if not measured.error:
            return
        self.decibels[name] = _decibels(measured)
        group = self.groups.setdefault(_group(name), RelativeError())
        for sums in (group, self.total):
            sums.include(measured)

    def total_lines(self) -> list[str]:
        """Returns a sentence for all weights, or nothing where none has an error."""
        if not self.decibels:
            return []
        total = _decibels(self.total)
        return [f"The packed weights are {total:.1f} dB above their rounding errors."]

    def layer_lines(self) -> list[str]:
        """Returns short lines: the worst layers, and the worst groups."""
        if not self.decibels:
            return []
        worst = sorted(self.decibels, key=self.decibels.__getitem__)[:WORST]
        lines = ["The layers that lose the most, in dB: " + ", ".join(
            f"{name.removesuffix('.weight')} {self.decibels[name]:.1f}" for name in worst)]
        if 1 < len(self.groups) < len(self.decibels):
            groups = sorted(self.groups, key=lambda group: _decibels(self.groups[group]))
            lines.append("The same by kind of layer: " + ", ".join(
                f"{group} {_decibels(self.groups[group]):.1f}" for group in groups[:WORST]))
        return lines


def _group(name: str) -> str:
    """Returns what the weights of the same layer in other blocks have in common."""
    return NUMBER.sub("*", name.removesuffix(".weight"), count=1)


def _decibels(measured: RelativeError) -> float:
    return 10 * math.log10(measured.power / measured.error)
