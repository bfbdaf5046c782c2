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

    def lines(self) -> list[str]:
        """Returns short sentences: for all weights, the worst layers, and the worst groups."""
        if not self.decibels:
            return []
        worst = sorted(self.decibels, key=self.decibels.__getitem__)[:WORST]
        lines = [
            f"The packed weights are {_decibels(self.total):.1f} dB above their rounding errors.",
            "The least: " + ", ".join(
                f"{name.removesuffix('.weight')} {self.decibels[name]:.1f}" for name in worst)]
        if 1 < len(self.groups) < len(self.decibels):
            groups = sorted(self.groups, key=lambda group: _decibels(self.groups[group]))
            lines.append("By kind of layer, the least: " + ", ".join(
                f"{group} {_decibels(self.groups[group]):.1f}" for group in groups[:WORST]))
        return lines


def _group(name: str) -> str:
    """Returns what the weights of the same layer in other blocks have in common."""
    return NUMBER.sub("*", name.removesuffix(".weight"), count=1)


def _decibels(measured: RelativeError) -> float:
    return 10 * math.log10(measured.power / measured.error)
