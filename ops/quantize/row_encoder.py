"""Chooses the scales and codes of rows in ComfyUI's own formats, and writes them.

Inside, values are in the basis of the codes, and divided by the number of their row or of the
tensor where the layout multiplies scales by one: then value = unit * number of a code, where the
unit is a stored scale.
"""
from dataclasses import dataclass

import torch

from ..formats.base import inverse
from ..formats.comfyui import E2M1
from ..formats.rotation import rotate
from ..formats.row_layout import FAMILIES, RowFormat
from ..tensor.packed_layout import packed_rows
from ..tensor.packed_tensor import PackedTensor

LARGEST_INTEGER = 127.0  # in magnitude, of int8 codes and of requantised numbers
LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-30  # scale in float32
SLICE_VALUES = 1 << 20  # encoded at a time
SAMPLE_VALUES = 1 << 20  # of a weight, from which the scale of all of it is chosen


@dataclass
class RowNumbers:
    """The numbers of n rows.

    Attributes:
        levels: float32 (n, groups, group), the numbers of the codes.
        units: float32 (n, groups, 1), as they are stored.
        of_rows: float32 (n, 1, 1), by which a row's units are multiplied.
    """
    levels: torch.Tensor
    units: torch.Tensor
    of_rows: torch.Tensor

    @classmethod
    def join(cls, parts: list["RowNumbers"]) -> "RowNumbers":
        """Returns the numbers of the rows of several parts."""
        return cls(*(torch.cat([getattr(part, name) for part in parts])
                     for name in ("levels", "units", "of_rows")))

    def rows(self, chosen: slice) -> "RowNumbers":
        """Returns the numbers of some rows, which share memory."""
        return RowNumbers(self.levels[chosen], self.units[chosen], self.of_rows[chosen])


class RowEncoder:
    """Encodes rows of one format.

    Args:
        packed_format: of int8, float8 or 4-bit codes with one scale a row or a group.
        shrinks: the scales tried, as shares of the one that just holds the largest value of a
            group.
    """

    def __init__(self, packed_format: RowFormat, shrinks: tuple[float, ...]):
        self.format, self.layout = packed_format, packed_format.layout
        self.shrinks = shrinks
        self.of_tensor: float | None = None
        numbers = packed_format.code_numbers()
        self.levels, self.codes = torch.sort(numbers.nan_to_num(0))
        self.largest = float(min(-self.levels[0], self.levels[-1], LARGEST_INTEGER)
                             if self.layout.codes.dtype == torch.int8 else self.levels[-1])

    def basis(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows, float32 (n, K), in the basis of the codes."""
        if not self.layout.rotation:
            return rows
        rotated = rotate(rows, self.layout.rotation, self.layout.rotation_base)
        return rotated.mul_(self.layout.rotation**-0.5)

    def choose_scale_of_tensor(self, weight: torch.Tensor, peak: float):
        """Chooses the number that all scales of a weight are, or are multiplied by.

        Args:
            weight: (N, K) of any float dtype.
            peak: its largest magnitude.
        """
        if self.layout.row_scale:
            self.of_tensor = max(SMALLEST, peak / (LARGEST_E4M3 * self.largest))
            return
        every = max(1, weight.numel() // SAMPLE_VALUES)
        sample = weight[::every].float().unsqueeze(1)
        scales = [max(SMALLEST, peak / self.largest * shrink) for shrink in self.shrinks]
        errors = [float((self.nearest(sample, sample.new_tensor(scale)) * scale - sample)
                        .square().sum()) for scale in scales]
        self.of_tensor = scales[errors.index(min(errors))]

    def search(self, values: torch.Tensor) -> RowNumbers:
        """Returns the numbers of least error for values in the basis of the codes, (n, K)."""
        of_rows = self._of_rows(values)
        groups = values.view(len(values), self.layout.groups, -1)
        if self.layout.row_scale or self.layout.is_requantized:
            groups = groups * inverse(of_rows)
        if self.of_tensor is not None and not self.layout.row_scale:
            units = torch.full_like(groups[..., :1], self.of_tensor)
            return RowNumbers(self.nearest(groups, units), units, of_rows)
        peak = groups.abs().amax(-1, keepdim=True)
        best = None
        for shrink in self.shrinks:
            units = self.stored(peak * (shrink / self.largest))
            levels = self.nearest(groups, units)
            if len(self.shrinks) == 1:
                return RowNumbers(levels, units, of_rows)
            error = (self.values(levels, units) - groups).square_().sum(-1, keepdim=True)
            if best is None:
                best = [error, levels, units]
                continue
            is_better = error < best[0]
            best = [torch.where(is_better, part, kept)
                    for part, kept in zip((error, levels, units), best)]
        assert best is not None
        return RowNumbers(best[1], best[2], of_rows)

    def _of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns what a row's units are multiplied by, float32 (n, 1, 1)."""
        if self.layout.is_requantized:
            peak = values.abs().amax(1).view(-1, 1, 1)
            return (peak / LARGEST_INTEGER).clamp_(min=SMALLEST)
        one = self.of_tensor if self.layout.row_scale and self.of_tensor is not None else 1.0
        return values.new_full((len(values), 1, 1), one)

    def stored(self, units: torch.Tensor) -> torch.Tensor:
        """Returns units as the layout stores them, float32."""
        kind = self.layout.scale.kind
        if kind == "e8m0":  # the next power of two
            mantissa, exponent = torch.frexp(units)
            exponent = (exponent - (mantissa == 0.5).int()).clamp_(-126, 127)
            powers = torch.ldexp(torch.ones_like(units), exponent)
            return torch.where(units > 0, powers, torch.zeros_like(units))
        if kind == "e4m3":
            return units.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float()
        return units.clamp(min=SMALLEST)

    def nearest(self, values: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of the codes nearest to values over their units."""
        scaled = values / torch.where(units > 0, units, torch.inf)
        dtype = self.layout.codes.dtype
        if dtype == torch.int8:
            return scaled.round_().clamp_(-self.largest, self.largest)
        if dtype.is_floating_point:
            return scaled.clamp_(-self.largest, self.largest).to(dtype).float()
        if self.layout.codes.numbers == E2M1:
            size = scaled.abs().clamp_(max=self.largest)
            step = 0.5 + (size >= 2) * 0.5 + (size >= 4)  # 0.5, 1 or 2
            return torch.copysign((size / step).round_().mul_(step), scaled)
        levels = self.levels.to(values.device)
        return levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)]

    def values(self, levels: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Returns the values of numbers of codes, without what units are multiplied by."""
        if self.layout.is_requantized:
            return (levels * units).round_().clamp_(-LARGEST_INTEGER, LARGEST_INTEGER)
        return levels * units

    def packed(self, numbers: RowNumbers, shape: tuple[int, ...]) -> PackedTensor:
        """Returns the packed weight of a shape."""
        scale = numbers.units
        if self.layout.scale.kind == "e4m3":
            scale = scale.to(torch.float8_e4m3fn)
        elif self.layout.scale.kind == "e8m0":
            scale = torch.where(scale > 0, torch.frexp(scale)[1] + 126, 0).to(torch.uint8)
        tensors = {"scale": scale.contiguous().view(-1)}
        if self.layout.row_scale or self.layout.is_requantized:
            tensors["row_scale"] = numbers.of_rows.contiguous().view(-1)
        return packed_rows(FAMILIES[self.format.family], self._bytes(numbers.levels.flatten(1)),
                           shape, self.format.sizes, **tensors)

    def _bytes(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the bytes of codes with some numbers, (n, K)."""
        codes = self.layout.codes
        if codes.bits == 8:
            return levels.to(codes.dtype).view(torch.uint8)
        sorted_levels, code_of = self.levels.to(levels.device), self.codes.to(levels.device)
        out = levels.new_empty((len(levels), levels.shape[1] // 2), dtype=torch.uint8)
        step = max(1, SLICE_VALUES // levels.shape[1])
        for rows, target in zip(levels.split(step), out.split(step)):
            places = torch.bucketize(rows, sorted_levels, out_int32=True)
            nibbles = code_of[places].to(torch.uint8)
            first, second = nibbles[:, ::2], nibbles[:, 1::2]
            if codes.order == "high first":
                first, second = second, first
            torch.bitwise_or(first, second << 4, out=target)
        return out
