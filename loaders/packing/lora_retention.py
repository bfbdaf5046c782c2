"""Measures how much of each LoRA arrives in a file, by least squares over all changed tensors.

With W the weights without changes, d_i what the i-th change adds, and P the packed weights, the
gains g are those for which sum g_i d_i is nearest to P - W. A gain of 1 is all of it.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...ops.patcher.patched_weights import Patch


@dataclass(frozen=True)
class LoraShare:
    """How much of one change arrived.

    title: of the change. layers: number of weights it changes. gain: the part of it that arrived.
    size: its norm over the norm of these weights.
    """

    title: str
    layers: int
    gain: float
    size: float

    def __str__(self) -> str:
        weights = "1 weight" if self.layers == 1 else f"{self.layers} weights"
        return (
            f"{self.title}: {self.gain:.1%} of it is kept, on {weights}, which it changes by"
            f" {self.size:.2%} of their norm"
        )


class LoraRetention:
    """Collects, tensor by tensor, what changes add and what of it arrives.

    patches: of each weight. Those of one LoRA share its `loaded_keys`.
    """

    def __init__(self, patches: Iterable[Sequence[Patch]]):
        self.titles: dict[tuple, str] = {}
        counts = {"LoRA": 0, "merge": 0, "change": 0}
        for weight_patches in patches:
            for patch in weight_patches:
                key = patch_group(patch)
                if key not in self.titles:
                    counts[key[0]] += 1
                    self.titles[key] = f"{key[0]} {counts[key[0]]} (strength {patch[0]:g})"
        self.index = {key: number for number, key in enumerate(self.titles)}
        # A row for each change: its dot products with every change and with what arrived, the power
        # of the weights without changes, and the number of weights.
        self.sums = torch.zeros(len(self.index), len(self.index) + 3, dtype=torch.float64)

    def groups(self, patches: Sequence[Patch]) -> list[tuple[int, list[Patch]]]:
        """Groups patches by change, in the order in which they are applied.

        Returns:
            (number of the change, its patches).
        """
        groups: list[tuple[int, list[Patch]]] = []
        for patch in patches:
            number = self.index[patch_group(patch)]
            if groups and groups[-1][0] == number:
                groups[-1][1].append(patch)
            else:
                groups.append((number, [patch]))
        return groups

    def measure(self, base: torch.Tensor, changes: Sequence[tuple[int, torch.Tensor]],
                packed: torch.Tensor, is_first: bool) -> torch.Tensor:
        """Returns what some rows of a weight add to `sums`.

        Args:
            base: rows without the changes, float32.
            changes: (number, what it adds), float32.
            packed: what is written, float32.
            is_first: whether these are the first rows of the weight.
        """
        sums, arrived = torch.zeros_like(self.sums), packed - base
        for number, change in changes:
            for other_number, other_change in changes:
                sums[number, other_number] += dot(change, other_change)
            sums[number, -3:] += torch.tensor(
                [dot(change, arrived), dot(base, base), float(is_first)], dtype=torch.float64)
        return sums

    def shares(self) -> list[LoraShare]:
        """Returns the share of each change, in the order of the model."""
        products, arrived, power, layers = self.sums.split_with_sizes([len(self.index), 1, 1, 1], 1)
        gains = torch.linalg.lstsq(products, arrived, driver="gelsd").solution
        sizes = (products.diag().unsqueeze(1) / power.clamp_min(1e-30)).sqrt()
        return [
            LoraShare(title, int(count), gain.item(), size.item())
            for title, count, gain, size in zip(self.titles.values(), layers, gains, sizes) if count
        ]


def patch_group(patch: Patch) -> tuple:
    """Returns a key that the patches of one LoRA, merge or other change have in common."""
    strength, value, strength_model, _, _ = patch
    if hasattr(value, "loaded_keys"):
        return "LoRA", id(value.loaded_keys), strength
    return "merge" if isinstance(value, list) else "change", strength, strength_model


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the dot product of two float32 tensors of the same shape."""
    return torch.dot(a.reshape(-1), b.reshape(-1)).item()
