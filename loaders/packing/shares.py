"""What of each LoRA on a model arrives in the file: by least squares, over all tensors that were touched.

With W what was held, d_i what the i-th change should add, and P what is packed, the gains g are those for which sum g_i d_i is
nearest to P - W. A gain of 1 is all of it.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...ops.patcher.values import Patch


@dataclass(frozen=True)
class Share:
    """title: of the change. layers: how many weights it touches. gain: the part of it that arrived. size: its norm over that
    of the weights it touches."""

    title: str
    layers: int
    gain: float
    size: float

    def __str__(self) -> str:
        return (f"{self.title}: {self.gain:.1%} of it is kept, on {self.layers} weight{'s' if self.layers != 1 else ''}, which it"
                f" changes by {self.size:.2%} of their norm")


class Shares:
    """Collects, tensor by tensor, what changes should have added and what has arrived."""

    def __init__(self, patches: Iterable[Sequence[Patch]]):
        """patches: of each weight. Patches of one LoRA share the set of the names that were read of its file."""
        self.titles: dict[tuple, str] = {}
        counts = {"LoRA": 0, "merge": 0, "change": 0}
        for of_weight in patches:
            for patch in of_weight:
                key = change_of(patch)
                if key not in self.titles:
                    counts[key[0]] += 1
                    self.titles[key] = f"{key[0]} {counts[key[0]]} (strength {patch[0]:g})"
        self.index = {key: number for number, key in enumerate(self.titles)}
        count = len(self.index)
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.arrived = torch.zeros(count, dtype=torch.float64)
        self.weights = torch.zeros(count, dtype=torch.float64)
        self.layers = [0] * count
        self.error = self.whole = 0.0

    def groups(self, patches: Sequence[Patch]) -> list[tuple[int, list[Patch]]]:
        """(number of the change, its patches) in the order in which they are applied."""
        groups: list[tuple[int, list[Patch]]] = []
        for patch in patches:
            number = self.index[change_of(patch)]
            if groups and groups[-1][0] == number:
                groups[-1][1].append(patch)
            else:
                groups.append((number, [patch]))
        return groups

    def add(self, held: torch.Tensor, changes: Sequence[tuple[int, torch.Tensor]], packed: torch.Tensor, first: bool):
        """Some rows of a weight. held, packed: float32. changes: (number, what it adds). first: of the weight."""
        arrived = (packed - held).view(-1)
        norm = _dot(held, held)
        for number, change in changes:
            self.arrived[number] += _dot(change, arrived)
            self.weights[number] += norm
            self.layers[number] += first
            for other, another in changes:
                self.products[number, other] += _dot(change, another)

    def found(self) -> list[Share]:
        """Of each change, in the order of the model."""
        solved = torch.linalg.lstsq(self.products, self.arrived.unsqueeze(-1), driver="gelsd").solution.view(-1)
        return [Share(title, self.layers[number], solved[number].item(),
                      (self.products[number, number] / self.weights[number].clamp_min(1e-30)).sqrt().item())
                for title, number in zip(self.titles.values(), self.index.values()) if self.layers[number]]


def change_of(patch: Patch) -> tuple:
    """What tells the patches of one LoRA, merge or other change from those of the next."""
    strength, value, strength_model, _, _ = patch
    if hasattr(value, "loaded_keys"):
        return "LoRA", id(value.loaded_keys), strength
    return "merge" if isinstance(value, list) else "change", strength, strength_model


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double()).item()
