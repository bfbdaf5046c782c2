"""`LowRank`: the sum of all plain LoRAs of a layer, as factors that run beside the product with its
weight."""
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .pickle_names import stable_pickle_name


@stable_pickle_name
class Slice(NamedTuple):
    """Rows of the output [row, row_end), to which the ranks [rank, rank_end) of the down factor
    contribute."""
    row: int
    row_end: int
    rank: int
    rank_end: int


@stable_pickle_name
@dataclass(frozen=True, eq=False)
class LowRank:
    """What `y += (x A^T) B^T` adds to a layer of logical weight shape (N, K), B in slices of rows
    that do not overlap.

    down: A (R, K), of all LoRAs along their ranks. ups: for each slice its part of B, (row_end -
    row, rank_end - rank), strength and alpha folded in. slices: as many. All tensors have one dtype
    and lie on one device.
    """
    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    slices: tuple[Slice, ...]

    @staticmethod
    def from_factors(loras: Iterable[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]], rows: int,
                   dtype: torch.dtype) -> "LowRank":
        """Factors (up, down, (first row, end row)) of one or more LoRAs as one. LoRAs on the same
        rows, or on rows that overlap, share one up factor.

        up: float32 (end row - first row, r), scaled. down: float32 (r, K). rows: N. dtype: of the
        result, into whose range a LoRA may fit only once its factors are balanced.
        """
        groups = {}
        for up, down, row_range in loras:
            up, down = _balanced(up, down)
            downs, ups = groups.setdefault(row_range, ([], []))
            downs.append(down)
            ups.append(up)
        # added one after the other to what is rounded already, a weak LoRA would be lost
        if _overlap(groups):
            downs = [down for downs, _ in groups.values() for down in downs]
            ups = [torch.nn.functional.pad(up, (0, 0, row, rows - row_end))
                   for (row, row_end), (_, of_rows) in groups.items() for up in of_rows]
            groups = {(0, rows): (downs, ups)}
        slices, rank = [], 0
        for row_range, (downs, _) in groups.items():
            ranks = sum(down.shape[0] for down in downs)
            slices.append(Slice(*row_range, rank, rank + ranks))
            rank += ranks
        down = torch.cat([down for downs, _ in groups.values() for down in downs]).to(dtype)
        return LowRank(down, tuple(torch.cat(ups, 1).to(dtype) for _, ups in groups.values()),
                       tuple(slices))

    @staticmethod
    def from_operands(down: torch.Tensor | None, ups: list[torch.Tensor],
                    slices: list[int]) -> "LowRank | None":
        """The inverse of `operands`."""
        if down is None:
            return None
        return LowRank(down, tuple(ups),
                       tuple(Slice(*slices[start:start + 4]) for start in range(0, len(slices), 4)))

    @property
    def operands(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
        """As a torch operator can take it: the slices as four numbers each, in one list."""
        return self.down, list(self.ups), [number for part in self.slices for number in part]

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in (self.down, *self.ups))

    def parts(self) -> Iterator[tuple[Slice, torch.Tensor]]:
        """Each slice with its part of B."""
        return zip(self.slices, self.ups)

    def to(self, target: torch.Tensor | torch.device) -> "LowRank":
        """On another device, or in the dtype and on the device of a tensor."""
        return LowRank(self.down.to(target), tuple(up.to(target) for up in self.ups), self.slices)

    def clone(self) -> "LowRank":
        return LowRank(self.down.clone(), tuple(up.clone() for up in self.ups), self.slices)

    def product(self, input: torch.Tensor, rows: int) -> torch.Tensor:
        """`(input A^T) B^T`, to which the product with the weight is added. input: (M, K). rows: N.
        Returns (M, N)."""
        hidden = input @ self.down.t()
        if len(self.ups) == 1 and self.slices[0][:2] == (0, rows):
            return hidden @ self.ups[0].t()
        all_rows = sum(part.row_end - part.row for part in self.slices) == rows
        out = (input.new_empty if all_rows else input.new_zeros)((input.shape[0], rows))
        for part, up in self.parts():
            ranks, change = hidden[:, part.rank:part.rank_end], out[:, part.row:part.row_end]
            if hidden.requires_grad:
                change.copy_(ranks @ up.t())
            else:
                torch.mm(ranks, up.t(), out=change)  # has no gradient
        return out

    def add_to(self, weight: torch.Tensor):
        """Write `W + B A` to a dense weight W of N rows."""
        for part, up in self.parts():
            weight.flatten(1)[part.row:part.row_end].addmm_(
                up.to(weight), self.down[part.rank:part.rank_end].to(weight))


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product is bit for bit the same, the largest numbers of both alike in each
    rank.

    up: float32 (rows, r). down: float32 (r, columns).
    """
    up_exponent, down_exponent = (peak.view(torch.int32) >> 23
                                  for peak in (up.abs().amax(0), down.abs().amax(1)))
    half = (up_exponent - down_exponent >> 1).clamp(-126, 126)
    # of two
    power, inverse = ((127 + exponent << 23).view(torch.float32) for exponent in (half, -half))
    return up * inverse, down * power[:, None]


def dense_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                 low_rank: LowRank | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` plus a low-rank branch; weight: (N, K), all in the dtype of
    `input`."""
    if low_rank is None:
        return torch.nn.functional.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    out = low_rank.product(flat, weight.shape[0]).addmm(flat, weight.t())
    return (out if bias is None else out + bias).view(*input.shape[:-1], weight.shape[0])


def _overlap(row_ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether any two of them (first row, end row) share a row."""
    row_ranges = sorted(row_ranges)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(row_ranges))
