"""The K-quants: 256 values in groups of 16 or 32 with quantised scales under float16 super-scales.

Unless a table says otherwise, the fields at the same bits of 32 adjacent bytes hold 32 adjacent
values.

Sources: `block_q*_K` in ggml-common.h, `dequantize_row_q*_K` in ggml-quants.c, gguf-py 0.19
`quants.py`.
"""
import torch

from .base import Fit, Format, Grid, Terms
from .bits import bit_planes, half, half_bytes, join_planes, reinterpret


class Q2_K(Format, ggml_type=10):
    """value = (d * scale) * code - (dmin * min), one scale and one min per 16 values

    | offset | size | meaning                                          |
    |--------|------|--------------------------------------------------|
    | 0      | 16   | scales in the low nibbles, mins in the high ones |
    | 16     | 64   | qs, codes, four a byte                           |
    | 80     | 2    | d, float16                                       |
    | 82     | 2    | dmin, float16                                    |
    """

    block_length, block_bytes = 256, 84
    grid = Grid(256, 16, tuple(range(4)), scales=(0, 15), minimum=True)

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales_and_mins = bit_planes(blocks[:, :16], 4) * half(blocks, 80, 2).unsqueeze(-1)
        scales, mins = scales_and_mins.unsqueeze(-1).unbind(1)
        codes = bit_planes(blocks[:, 16:80].view(-1, 2, 32), 2).view(-1, 16, 16)
        return Terms(codes, scales, mins)

    def encode(self, fit: Fit) -> torch.Tensor:
        assert fit.minima is not None and fit.dmin is not None
        scales = fit.scales.to(torch.uint8).add_(fit.minima.to(torch.uint8), alpha=16)
        codes = join_planes(fit.codes, 2, 32)
        return torch.cat([scales, codes, half_bytes(fit.d), half_bytes(fit.dmin)], 1)


class Q3_K(Format, ggml_type=11):
    """value = (d * (scale - 32)) * (code - 4), one scale per 16 values

    | offset | size | meaning                                                                     |
    |--------|------|-----------------------------------------------------------------------------|
    | 0      | 32   | hmask, third bits of the codes: bit i of a byte for values 32 i..32 i + 31  |
    | 32     | 64   | qs, low two bits of the codes, four a byte                                  |
    | 96     | 8    | low four bits of scales: 0..7 in the low nibbles, 8..15 in the high ones    |
    | 104    | 4    | high two bits of scales: 0..3 in bits 0 and 1, 4..7 in bits 2 and 3, and on |
    | 108    | 2    | d, float16                                                                  |
    """

    block_length, block_bytes = 256, 110
    grid = Grid(256, 16, tuple(range(-4, 4)), scales=(-32, 31))

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales = bit_planes(blocks[:, 96:104], 4).view(-1, 16)
        scales.add_(bit_planes(blocks[:, 104:108], 2).view(-1, 16), alpha=16)
        scales = scales.view(torch.int8).sub_(32) * half(blocks, 108)
        codes = bit_planes(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 8, 32)
        codes.add_(bit_planes(blocks[:, :32], 1), alpha=4)
        return Terms(codes.view(torch.int8).sub_(4).view(-1, 16, 16), scales.unsqueeze(-1))

    def encode(self, fit: Fit) -> torch.Tensor:
        scales = (fit.scales + 32).to(torch.uint8)
        codes = [join_planes(fit.codes // 4, 1, 32), join_planes(fit.codes & 3, 2, 32)]
        scale_bytes = [join_planes(scales & 15, 4, 8), join_planes(scales // 16, 2, 4)]
        return torch.cat([*codes, *scale_bytes, half_bytes(fit.d)], 1)


def _scales_and_mins(packed: torch.Tensor) -> torch.Tensor:
    """Returns the eight 6-bit scales and eight 6-bit mins of Q4_K and Q5_K, uint8 (n, 2, 8).

    Args:
        packed: uint8 (n, 12), three groups of four bytes. Each letter is a bit, most significant
            bit first, of a scale (uppercase) or a min (lowercase):

            EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
            eeaaaaaa ffbbbbbb ggcccccc hhdddddd
            eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH
    """
    lanes = reinterpret(packed, torch.int32)[:, :2]
    low = bit_planes(packed[:, 8:], 4).view(torch.int32).squeeze(-1)
    first, second = lanes & 0x3F3F3F3F, low.bitwise_or_(lanes >> 2 & 0x30303030)
    return torch.stack([first, second], -1).view(torch.uint8)


def _super_scales(fit: Fit) -> torch.Tensor:
    """Returns the first 16 bytes of a block of Q4_K or Q5_K: d, dmin, scales and mins."""
    assert fit.minima is not None and fit.dmin is not None
    scales, mins = fit.scales.to(torch.uint8), fit.minima.to(torch.uint8)
    first = [part[:, :4] + part[:, 4:] // 16 * 64 for part in (scales, mins)]
    last = (scales[:, 4:] & 15) + mins[:, 4:] * 16
    return torch.cat([half_bytes(fit.d), half_bytes(fit.dmin), *first, last], 1)


class Q4_K(Format, ggml_type=12):
    """value = (d * scale) * code - (dmin * min), one scale and one min per 32 values

    | offset | size | meaning                                     |
    |--------|------|---------------------------------------------|
    | 0      | 2    | d, float16                                  |
    | 2      | 2    | dmin, float16                               |
    | 4      | 12   | scales and mins, 6 bits: `_scales_and_mins` |
    | 16     | 128  | qs, codes, two a byte                       |
    """

    block_length, block_bytes = 256, 144
    grid = Grid(256, 32, tuple(range(16)), scales=(0, 63), minimum=True)

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales_and_mins = _scales_and_mins(blocks[:, 4:16]) * half(blocks, 0, 2).unsqueeze(-1)
        scales, mins = scales_and_mins.unsqueeze(-1).unbind(1)
        codes = bit_planes(blocks[:, 16:].view(-1, 4, 32), 4).view(-1, 8, 32)
        return Terms(codes, scales, mins)

    def encode(self, fit: Fit) -> torch.Tensor:
        return torch.cat([_super_scales(fit), join_planes(fit.codes, 4, 32)], 1)


class Q5_K(Format, ggml_type=13):
    """value = (d * scale) * code - (dmin * min), one scale and one min per 32 values

    | offset | size | meaning                                                                 |
    |--------|------|-------------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                              |
    | 2      | 2    | dmin, float16                                                           |
    | 4      | 12   | scales and mins, 6 bits: `_scales_and_mins`                             |
    | 16     | 32   | qh, fifth bits of the codes: bit i of a byte for values 32 i..32 i + 31 |
    | 48     | 128  | qs, low four bits of the codes, two a byte                              |
    """

    block_length, block_bytes = 256, 176
    grid = Grid(256, 32, tuple(range(32)), scales=(0, 63), minimum=True)

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales_and_mins = _scales_and_mins(blocks[:, 4:16]) * half(blocks, 0, 2).unsqueeze(-1)
        scales, mins = scales_and_mins.unsqueeze(-1).unbind(1)
        codes = bit_planes(blocks[:, 48:].view(-1, 4, 32), 4).view(-1, 8, 32)
        codes.add_(bit_planes(blocks[:, 16:48], 1), alpha=16)
        return Terms(codes, scales, mins)

    def encode(self, fit: Fit) -> torch.Tensor:
        codes = [join_planes(fit.codes // 16, 1, 32), join_planes(fit.codes & 15, 4, 32)]
        return torch.cat([_super_scales(fit), *codes], 1)


class Q6_K(Format, ggml_type=14):
    """value = (d * scale) * (code - 32), one scale per 16 values

    | offset | size | meaning                                                              |
    |--------|------|----------------------------------------------------------------------|
    | 0      | 128  | ql, low four bits of the codes, two a byte; 64 bytes hold 128 values |
    | 128    | 64   | qh, high two bits of the codes, four a byte                          |
    | 192    | 16   | scales, int8                                                         |
    | 208    | 2    | d, float16                                                           |
    """

    block_length, block_bytes = 256, 210
    grid = Grid(256, 16, tuple(range(-32, 32)), scales=(-128, 127))

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales = blocks[:, 192:208].view(torch.int8) * half(blocks, 208)
        codes = bit_planes(blocks[:, :128].view(-1, 2, 64), 4).view(-1, 16, 16)
        codes.add_(bit_planes(blocks[:, 128:192].view(-1, 2, 32), 2).view(-1, 16, 16), alpha=16)
        return Terms(codes.view(torch.int8).sub_(32), scales.unsqueeze(-1))

    def encode(self, fit: Fit) -> torch.Tensor:
        scales = fit.scales.to(torch.int8).view(torch.uint8)
        codes = [join_planes(fit.codes & 15, 4, 64), join_planes(fit.codes // 16, 2, 32)]
        return torch.cat([*codes, scales, half_bytes(fit.d)], 1)


class Q8_K(Format, ggml_type=15):
    """value = d * code

    Unlike the other K-quants it has one float32 scale; ggml uses it for activations.

    | offset | size | meaning                                                         |
    |--------|------|-----------------------------------------------------------------|
    | 0      | 4    | d, float32                                                      |
    | 4      | 256  | qs, codes, int8                                                 |
    | 260    | 32   | bsums, int16, sums of 16 codes, for dot products; not used here |
    """

    block_length, block_bytes = 256, 292

    def terms(self, blocks: torch.Tensor) -> Terms:
        return Terms(blocks[:, 4:260].view(torch.int8), reinterpret(blocks[:, :4], torch.float32))
