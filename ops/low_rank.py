"""`LowRank`: the sum of all plain LoRAs of a layer, as the factors of one branch."""
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .stable_names import stable_pickle_name


@stable_pickle_name
class Slice(NamedTuple):
    """Rows [row, row_end) of the output, which ranks [rank, rank_end) of the down factor change."""
    row: int
    row_end: int
    rank: int
    rank_end: int


@stable_pickle_name
@dataclass(frozen=True, eq=False)
class LowRank:
    """The branch `y += (x A^T) B^T` of a layer of logical weight shape (N, K).

    B is in slices of rows that do not overlap. All tensors have one dtype and are on one device.

    Attributes:
        down: A (R, K), of all LoRAs along their ranks.
        ups: B of each slice, (row_end - row, rank_end - rank), with strength and alpha in it.
        slices: as many as `ups`.
    """
    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]
    slices: tuple[Slice, ...]

    @staticmethod
    def from_factors(loras: Iterable[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]], rows: int,
                   dtype: torch.dtype) -> "LowRank":
        """Concatenates the factors of one or more LoRAs.

        LoRAs on the same rows, or on rows that overlap, share one up factor.

        Args:
            loras: (up, down, (first row, end row)) of each. up: float32 (end row - first row, r),
                scaled. down: float32 (r, K).
            rows: N.
            dtype: of the result. The factors are balanced first, since the range of `dtype` may be
                too small for them as they are.
        """
        balanced = ((*balance(up, down), row_range) for up, down, row_range in loras)
        return LowRank._concatenated(balanced, rows, dtype)

    def and_also(self, other: "LowRank | None", rows: int) -> "LowRank":
        """Returns the sum of two branches of a layer of N `rows`, in this one's dtype."""
        if other is None:
            return self
        factors = ((up, branch.down[part.rank:part.rank_end], (part.row, part.row_end))
                   for branch in (self, other) for part, up in branch.parts())
        return LowRank._concatenated(factors, rows, self.down.dtype)

    @staticmethod
    def _concatenated(factors: Iterable[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]],
                      rows: int, dtype: torch.dtype) -> "LowRank":
        """Concatenates the factors of several branches; see `from_factors`."""
        groups = {}
        for up, down, row_range in factors:
            downs, ups = groups.setdefault(row_range, ([], []))
            downs.append(down)
            ups.append(up)
        # added to a sum that is already rounded, a weak LoRA would be lost
        if _overlap(groups):
            all_downs = [down for downs, _ in groups.values() for down in downs]
            all_ups = [torch.nn.functional.pad(up, (0, 0, row, rows - row_end))
                       for (row, row_end), (_, ups) in groups.items() for up in ups]
            groups = {(0, rows): (all_downs, all_ups)}
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
        """Makes a branch from its `operands`; None where there is no down factor."""
        if down is None:
            return None
        fields = slices[::4], slices[1::4], slices[2::4], slices[3::4]
        return LowRank(down, tuple(ups), tuple(map(Slice, *fields)))

    @property
    def operands(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
        """(down, ups, slices) for a torch operator: four numbers for each slice, in one list."""
        return self.down, list(self.ups), list(itertools.chain.from_iterable(self.slices))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(factor.nbytes for factor in (self.down, *self.ups))

    def parts(self) -> Iterator[tuple[Slice, torch.Tensor]]:
        """Iterates over (slice, its part of B)."""
        return zip(self.slices, self.ups)

    def to(self, target: torch.Tensor | torch.device) -> "LowRank":
        """Moves the factors to a device, or to the dtype and device of a tensor."""
        return LowRank(self.down.to(target), tuple(up.to(target) for up in self.ups), self.slices)

    def clone(self) -> "LowRank":
        return LowRank(self.down.clone(), tuple(up.clone() for up in self.ups), self.slices)

    def product(self, input: torch.Tensor, rows: int) -> torch.Tensor:
        """Computes `(input A^T) B^T`, to which the product with the weight is then added.

        Args:
            input: (M, K).
            rows: N.

        Returns:
            (M, N).
        """
        hidden = input @ self.down.t()
        if len(self.ups) == 1 and self.slices[0][:2] == (0, rows):
            return hidden @ self.ups[0].t()
        out = input.new_empty((input.shape[0], rows))
        self.expand(hidden, out)
        return out

    def expand(self, hidden: torch.Tensor, out: torch.Tensor, start: int = 0):
        """Writes a part of `product`: the outputs from `start` on.

        Args:
            hidden: `input A^T`, (M, R).
            out: (M, n).
            start: the first of the n outputs.
        """
        parts = list(self._parts_within(start, out.shape[1]))
        if sum(len(up) for _, _, up in parts) < out.shape[1]:
            out.zero_()
        for part, first, up in parts:
            ranks, end = hidden[:, part.rank:part.rank_end], first + len(up)
            if hidden.requires_grad:
                out[:, first:end].copy_(ranks @ up.t())
            else:
                torch.mm(ranks, up.t(), out=out[:, first:end])  # `out` supports no gradient

    def write_up(self, out: torch.Tensor, start: int = 0):
        """Writes rows of B, with zeros where it is zero.

        Args:
            out: (n, R or more).
            start: the first of the n rows.
        """
        if len(self.ups) == 1 and self.ups[0].shape == out.shape:
            out.copy_(self.ups[0])
            return
        parts = list(self._parts_within(start, len(out)))
        if sum(up.numel() for _, _, up in parts) < out.numel():
            out.zero_()
        for part, first, up in parts:
            out[first:first + len(up), part.rank:part.rank_end] = up

    def _parts_within(self, start: int, count: int) -> Iterator[tuple[Slice, int, torch.Tensor]]:
        """Yields, of `count` rows from `start` on, (slice, the first of its rows, these of B)."""
        for part, up in self.parts():
            first, end = max(part.row, start), min(part.row_end, start + count)
            if first < end:
                yield part, first - start, up[first - part.row:end - part.row]

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """Computes `(grad B) A`, the gradient of the input of `product`.

        Args:
            grad: (M, N).

        Returns:
            (M, K).
        """
        hidden = grad.new_empty((grad.shape[0], self.down.shape[0]))
        for part, up in self.parts():
            torch.mm(grad[:, part.row:part.row_end], up,
                     out=hidden[:, part.rank:part.rank_end])
        return hidden @ self.down

    def add_to(self, weight: torch.Tensor):
        """Adds `B A` to a dense weight of N rows, in place."""
        for part, up in self.parts():
            weight.flatten(1)[part.row:part.row_end].addmm_(
                up.to(weight), self.down[part.rank:part.rank_end].to(weight))


def balance(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales the factors so that the largest numbers of both are alike in each rank.

    Args:
        up: float32 (rows, r).
        down: float32 (r, columns).
    """
    power, inverse = balancing_powers(up, down)
    return up * inverse, down * power[:, None]


def balancing_powers(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of `balance` for each rank of down and of up, float32 (r,) each.

    They are powers of two, so that the product stays the same bit for bit.
    """
    up_exponent, down_exponent = (peak.view(torch.int32) >> 23
                                  for peak in (up.abs().amax(0), down.abs().amax(1)))
    half = (up_exponent - down_exponent >> 1).clamp(-126, 126)
    # two to the power of `half`, and its inverse
    power, inverse = ((127 + exponent << 23).view(torch.float32) for exponent in (half, -half))
    return power, inverse


def dense_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                 low_rank: LowRank | None = None) -> torch.Tensor:
    """Computes `torch.nn.functional.linear` plus a low-rank branch.

    Args:
        input: (..., K).
        weight: (N, K) in the dtype of `input`.
        bias: (N,) in the dtype of `input`, or None.
        low_rank: in the dtype of `input`, or None.
    """
    if low_rank is None:
        return torch.nn.functional.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    out = low_rank.product(flat, weight.shape[0]).addmm_(flat, weight.t())
    return (out if bias is None else out.add_(bias)).view(*input.shape[:-1], weight.shape[0])


def _overlap(row_ranges: Iterable[tuple[int, int]]) -> bool:
    """Returns whether any two ranges (first row, end row) share a row."""
    row_ranges = sorted(row_ranges)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(row_ranges))
