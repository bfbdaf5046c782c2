"""What of each LoRA on a model arrives in the file: by least squares, over all tensors that were
touched.

With W what was held, d_i what the i-th change should add, and P what is packed, the gains g are
those for which sum g_i d_i is nearest to P - W. A gain of 1 is all of it.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...ops.patcher.patched_weights import Patch


@dataclass(frozen=True)
class Share:
    """How much of one change arrived.

    title: of the change. layers: how many weights it touches. gain: the part of it that arrived.
    size: its norm over that of the weights it touches.
    """

    title: str
    layers: int
    gain: float
    size: float

    def __str__(self) -> str:
        weights = "1 weight" if self.layers == 1 else f"{self.layers} weights"
        return f"{self.title}: {self.gain:.1%} of it is kept, on {weights}, which it changes by {self.size:.2%} of their norm"


class LoraRetention:
    """Collects, tensor by tensor, what changes should have added and what has arrived."""

    def __init__(self, patches: Iterable[Sequence[Patch]]):
        """patches: of each weight. Patches of one LoRA share the set of the names that were read of
        its file."""
        self.titles: dict[tuple, str] = {}
        counts = {"LoRA": 0, "merge": 0, "change": 0}
        for of_weight in patches:
            for patch in of_weight:
                key = patch_group(patch)
                if key not in self.titles:
                    counts[key[0]] += 1
                    self.titles[key] = f"{key[0]} {counts[key[0]]} (strength {patch[0]:g})"
        self.index = {key: number for number, key in enumerate(self.titles)}
        # A row for each change: its products with each change, with what arrived, the power of what
        # was held, and how many weights it touches.
        self.sums = torch.zeros(len(self.index), len(self.index) + 3, dtype=torch.float64)

    def groups(self, patches: Sequence[Patch]) -> list[tuple[int, list[Patch]]]:
        """(number of the change, its patches) in the order in which they are applied."""
        groups: list[tuple[int, list[Patch]]] = []
        for patch in patches:
            number = self.index[patch_group(patch)]
            if groups and groups[-1][0] == number:
                groups[-1][1].append(patch)
            else:
                groups.append((number, [patch]))
        return groups

    def measure(self, held: torch.Tensor, changes: Sequence[tuple[int, torch.Tensor]],
                packed: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Return what some rows of a weight add to `sums`.

        Args:
            held: without the changes, float32.
            changes: (number, what it adds), float32.
            packed: what is written, float32.
            is_first: whether these are the first rows.
        """
        sums, arrived = torch.zeros_like(self.sums), packed - held
        for number, change in changes:
            for other, of_other in changes:
                sums[number, other] += dot(change, of_other)
            sums[number, -3:] += torch.tensor(
                [dot(change, arrived), dot(held, held), float(is_first)], dtype=torch.float64)
        return sums

    def shares(self) -> list[Share]:
        """Of each change, in the order of the model."""
        products, arrived, power, layers = self.sums.split_with_sizes([len(self.index), 1, 1, 1], 1)
        gains = torch.linalg.lstsq(products, arrived, driver="gelsd").solution
        sizes = (products.diag().unsqueeze(1) / power.clamp_min(1e-30)).sqrt()
        return [
            Share(title, int(count), gain.item(), size.item())
            for title, count, gain, size in zip(self.titles.values(), layers, gains, sizes) if count
        ]


def patch_group(patch: Patch) -> tuple:
    """What tells the patches of one LoRA, merge or other change from those of the next."""
    strength, value, strength_model, _, _ = patch
    if hasattr(value, "loaded_keys"):
        return "LoRA", id(value.loaded_keys), strength
    return "merge" if isinstance(value, list) else "change", strength, strength_model


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sum of the products of two float32 tensors of one shape."""
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()
