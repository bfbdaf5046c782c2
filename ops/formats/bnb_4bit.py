"""bitsandbytes' 4-bit formats: a codebook of 16 values, scaled by each block's largest magnitude.

Sources: bitsandbytes 0.50 `functional.get_4bit_type`, `backends/default/ops.py`; the NF4 codebook
is from QLoRA (https://arxiv.org/abs/2305.14314).
"""
import dataclasses

import torch

from .base import Fit, Format, Grid, QParam, Terms
from .bits import byte_pairs, select


class Codebook4Bit(Format):
    """value = codebook[code] * absmax, in blocks along the flattened weight.

    A block may cross rows, and the last one may be short.

    | tensor | dtype, shape              | meaning                                      |
    |--------|---------------------------|----------------------------------------------|
    | packed | uint8 (ceil(values / 2),) | codes, two a byte, the high nibble first     |
    | absmax | float32 (blocks,)         | scale of each block of `block_length` values |
    """

    qparams = (QParam(torch.float32),)
    grid: Grid
    codebook: tuple[float, ...]

    def __init__(self, block_length: int | None = None):
        if block_length is not None:
            self.name = f"{self.name}_{block_length}"
            self.block_length, self.block_bytes = block_length, block_length // 2
            self.grid = dataclasses.replace(self.grid, length=block_length, group=block_length)

    def of_block_length(self, block_length: int) -> "Codebook4Bit":
        """Returns the same codes in blocks of another length."""
        own = block_length == type(self).block_length
        return type(self).of(*() if own else (block_length,))

    def code_pairs(self) -> torch.Tensor:
        """Returns the two float32 values of each byte, packed in int64 (256,)."""
        return byte_pairs(torch.tensor(self.codebook, dtype=torch.float32), high_first=True)

    def blocks(self, tensors, first, last):
        codes, absmax = tensors
        code_slice = slice(first * self.block_bytes, last * self.block_bytes)
        return codes.view(-1)[code_slice], absmax[first:last]

    def terms(self, codes: torch.Tensor, absmax: torch.Tensor) -> Terms:
        """Returns the terms of blocks; a short last block is padded with zeros.

        Args:
            codes: uint8 (bytes,).
            absmax: float32 (n,).
        """
        values = select(self.constant("code_pairs", codes.device), codes).view(torch.float32)
        missing = len(absmax) * self.block_length - len(values)
        if missing:
            values = torch.nn.functional.pad(values, (0, missing))
        return Terms(values.view(-1, self.block_length), absmax.unsqueeze(-1))

    def order(self) -> torch.Tensor:
        """Returns the codes sorted by their values, uint8 (16,), as in `Grid.levels`."""
        return torch.tensor(self.codebook, dtype=torch.float32).argsort().to(torch.uint8)

    def pack(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        absmax = values.abs().amax(-1, keepdim=True)
        levels = torch.tensor(self.grid.levels, dtype=torch.float32, device=values.device)
        scaled = (values * (1 / absmax.clamp(min=1e-38))).clamp_(-1, 1)
        codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        return self.encode(Fit(codes.to(torch.uint8), absmax, torch.ones_like(absmax)))

    def encode(self, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        codes = select(self.constant("order", fit.codes.device), fit.codes.view(-1)).view(-1, 2)
        return codes[:, 0] * 16 + codes[:, 1], fit.d.view(-1)


class NF4(Codebook4Bit):
    """The quantiles of a normal distribution."""

    block_length, block_bytes = 64, 32
    codebook = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
    grid = Grid(64, 64, codebook, scale_dtype=torch.float32)


class FP4(Codebook4Bit):
    """Sign, two bits of exponent, one of mantissa; in twelfths."""

    block_length, block_bytes = 64, 32
    codebook = tuple(sign * value / 12 for sign in (1, -1)
                     for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
    grid = Grid(64, 64, tuple(sorted(codebook)), scale_dtype=torch.float32)
