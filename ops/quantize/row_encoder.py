"""Chooses the scales and codes of rows in ComfyUI's own formats, and writes them.

Inside, values are in the basis of the codes, and divided by the number of their row or of the
tensor where the layout multiplies scales by one: then value = unit * number of a code, where the
unit is a stored scale.
"""
from dataclasses import dataclass

import torch

from ..formats.base import TooLargeError, inverse
from ..formats.comfy_quant import E2M1
from ..formats.rotation import rotate
from ..formats.row_layout import RowFormat, RowLayout
from .finite_peak import finite_peak

LARGEST_INTEGER = 127.0  # in magnitude, of int8 codes and of requantised numbers
LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-30  # scale in float32


@dataclass
class EncodedRows:
    """The bytes of n rows.

    Attributes:
        codes: uint8 (n, bytes of a row).
        scale: (n, groups) as the layout stores them, float32 or uint8.
        row_scale: float32 (n, 1), by which a row's scales are multiplied; None: by nothing.
    """
    codes: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor | None

    @classmethod
    def empty(cls, layout: RowLayout, rows: int, device: torch.device) -> "EncodedRows":
        """Returns memory for some rows of the layout's columns."""
        def of(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((rows, width), dtype=dtype, device=device)

        has_numbers = bool(layout.row_scale) or layout.is_requantized
        return cls(of(layout.columns * layout.codes.bits // 8, torch.uint8),
                   of(layout.groups, layout.scale.dtype),
                   of(1, torch.float32) if has_numbers else None)

    def rows(self, chosen: slice) -> "EncodedRows":
        """Returns some rows, which share memory."""
        row_scale = None if self.row_scale is None else self.row_scale[chosen]
        return EncodedRows(self.codes[chosen], self.scale[chosen], row_scale)


class RowEncoder:
    """Encodes rows of one format.

    Args:
        packed_format: of int8, float8 or 4-bit codes with one scale a row or a group.
        shrinks: the scales tried, as shares of the one that just holds the largest value of a
            group.

    Attributes:
        of_tensor: the number that all scales of the weight are, or are multiplied by; 0: each row
            has its own.
        lowest, largest: numbers of codes; int8 does without -128.
        has_integers: whether the numbers of codes are consecutive ones.
    """

    def __init__(self, packed_format: RowFormat, shrinks: tuple[float, ...]):
        self.format, self.layout = packed_format, packed_format.layout
        self.shrinks = shrinks
        self.of_tensor = 0.0
        numbers = packed_format.code_numbers()
        self.levels, codes = torch.sort(numbers.nan_to_num(0))
        self.codes = codes.to(torch.uint8)
        self.lowest, self.largest = float(self.levels[0]), float(self.levels[-1])
        self.has_integers = bool((self.levels.diff() == 1).all())
        if self.layout.codes.dtype == torch.int8:
            self.lowest = -self.largest

    def choose_scale_of_tensor(self, peak: float):
        """Sets `of_tensor` for a weight whose largest magnitude is `peak`."""
        largest = LARGEST_E4M3 * self.largest if self.layout.row_scale else self.largest
        self.of_tensor = max(SMALLEST, peak / largest)

    def shares(self) -> list[float]:
        """Returns the scales tried, as shares of `of_tensor` or of the largest value."""
        if self.of_tensor and not self.layout.row_scale:
            return [*self.shrinks]
        return [shrink / self.largest for shrink in self.shrinks]

    def encode(self, rows: torch.Tensor, out: EncodedRows):
        """Writes the bytes of rows; a kernel may do the same.

        Args:
            rows: (n, K) of any float dtype.
            out: of n rows, overwritten.

        Raises:
            FormatError: a value is not finite, or its rotation is too large.
        """
        values = self.basis(rows.float())
        if not torch.stack(values.aminmax()).isfinite().all():
            raise self.refusal(rows)
        of_rows = self._of_rows(values)
        groups = values.view(len(values), self.layout.groups, -1)
        if self.layout.row_scale or self.layout.is_requantized:
            groups = groups * inverse(of_rows)
        if self.of_tensor and not self.layout.row_scale:
            full = torch.full_like(groups[..., :1], self.of_tensor)
        else:
            full = groups.abs().amax(-1, keepdim=True)
        levels, units = self.fit(groups, full)
        self.write_codes(levels.flatten(1), out.codes)
        self.write_scales(units.flatten(1), out.scale)
        if out.row_scale is not None:
            out.row_scale.copy_(of_rows.flatten(1))

    def refusal(self, rows: torch.Tensor) -> TooLargeError:
        """Returns why rows cannot be encoded whose values in the basis of the codes are not finite.

        Raises:
            FormatError: a value is not finite itself.
        """
        largest = torch.finfo(torch.float32).max / max(1, self.layout.rotation)
        return TooLargeError(f"The weight holds values up to {finite_peak(rows):g};"
                             f" {self.format.name} holds {largest:g} in each column at most.")

    def basis(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows, float32 (n, K), in the basis of the codes."""
        if not self.layout.rotation:
            return rows
        rotated = rotate(rows, self.layout.rotation, self.layout.rotation_base)
        return rotated.mul_(self.layout.rotation**-0.5)

    def fit(self, groups: torch.Tensor, full: torch.Tensor,
            weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the numbers of codes and the units of least error, of those that are tried.

        Args:
            groups: float32 (..., group), without what units are multiplied by.
            full: of each group what the shares are of, float32 (..., 1).
            weights: float32 (group,), of the squared errors; None: equal ones.
        """
        best = None
        for share in self.shares():
            units = self.stored(full * share)
            levels = self.nearest(groups, units)
            if len(self.shrinks) == 1:
                return levels, units
            error = (self.values(levels, units) - groups).square_()
            if weights is not None:
                error *= weights
            error = error.sum(-1, keepdim=True)
            if best is None:
                best = [error, levels, units]
                continue
            is_better = error < best[0]
            best = [torch.where(is_better, part, kept)
                    for part, kept in zip((error, levels, units), best)]
        assert best is not None
        return best[1], best[2]

    def _of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns what a row's units are multiplied by, float32 (n, 1, 1)."""
        if self.layout.is_requantized:
            peak = values.abs().amax(1).view(-1, 1, 1)
            return (peak / LARGEST_INTEGER).clamp_(min=SMALLEST)
        one = self.of_tensor if self.layout.row_scale else 1.0
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

    def units(self, encoded: EncodedRows) -> torch.Tensor:
        """Returns the units of encoded rows, float32 (n, groups)."""
        flat = self.format.stored(self.layout.scale, "scale", {"scale": encoded.scale.flatten()})
        return flat.view(encoded.scale.shape)

    def nearest(self, values: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of the codes nearest to values over their units."""
        scaled = values / torch.where(units > 0, units, torch.inf)
        dtype = self.layout.codes.dtype
        if self.has_integers:
            return scaled.round_().clamp_(self.lowest, self.largest)
        if dtype.is_floating_point:
            return scaled.clamp_(self.lowest, self.largest).to(dtype).float()
        if self.layout.codes.numbers == E2M1:
            size = scaled.abs().clamp_(max=self.largest)
            step = 0.5 + (size >= 2) * 0.5 + (size >= 4)  # 0.5, 1 or 2
            return torch.copysign((size / step).round_().mul_(step), scaled)
        middles = self.middles().to(values.device)
        return self.levels.to(values.device)[torch.bucketize(scaled, middles, out_int32=True)]

    def middles(self) -> torch.Tensor:
        """Returns the middles between neighbouring numbers of codes, float32."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def values(self, levels: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Returns the values of numbers of codes, without what units are multiplied by."""
        if self.layout.is_requantized:
            return (levels * units).round_().clamp_(-LARGEST_INTEGER, LARGEST_INTEGER)
        return levels * units

    def bytes_of(self, columns: slice) -> slice:
        """Returns the bytes of a row that have the codes of some columns."""
        bits = self.layout.codes.bits
        return slice(columns.start * bits // 8, columns.stop * bits // 8)

    def write_scales(self, units: torch.Tensor, out: torch.Tensor):
        """Writes units as the layout stores them.

        Args:
            units: float32 (n, groups).
            out: (n, groups), see `EncodedRows.scale`.
        """
        kind = self.layout.scale.kind
        if kind == "e4m3":
            units = units.to(torch.float8_e4m3fn).view(torch.uint8)
        elif kind == "e8m0":
            units = torch.where(units > 0, torch.frexp(units)[1] + 126, 0)
        out.copy_(units)

    def write_codes(self, levels: torch.Tensor, out: torch.Tensor):
        """Writes the bytes of codes with some numbers.

        Args:
            levels: float32 (n, K).
            out: uint8 (n, bytes of a row).
        """
        codes = self.layout.codes
        if codes.bits == 8:
            out.copy_(levels.to(codes.dtype).view(torch.uint8))
            return
        sorted_levels, code_of = self.levels.to(levels.device), self.codes.to(levels.device)
        places = torch.bucketize(levels.contiguous(), sorted_levels, out_int32=True)
        nibbles = code_of[places]
        first, second = nibbles[:, ::2], nibbles[:, 1::2]
        if codes.order == "high first":
            first, second = second, first
        torch.bitwise_or(first, second << 4, out=out)
