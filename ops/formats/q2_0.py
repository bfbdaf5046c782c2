"""Two bits a value: -d, 0, d or 2 d, four adjacent values a byte.

Sources: `block_q2_0` in ggml-common.h and `dequantize_row_q2_0` in ggml-quants.c of llama.cpp
b11192.
"""
import torch

from .base import Format, Terms
from .bits import bit_planes, half


class TwoBitCodes(Format):
    """Base of the formats with one float16 scale and 2-bit codes, for blocks of any length."""

    def terms(self, blocks: torch.Tensor) -> Terms:
        codes = bit_planes(blocks[:, 2:], 2).view(torch.int8).sub_(1)
        return Terms(codes.transpose(1, 2), half(blocks, 0).unsqueeze(-1))


class Q2_0(TwoBitCodes, ggml_type=42):
    """value = d * (code - 1)

    | offset | size | meaning                                                          |
    |--------|------|------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                       |
    | 2      | 16   | qs, codes, four a byte, value i at bits 2 (i % 4) of byte i // 4 |
    """

    block_length, block_bytes = 64, 18


class PQ2_0(TwoBitCodes, ggml_type=142):
    """value = d * (code - 1)

    A format of PrismML's llama.cpp, whose first files call it Q2_0 with the number 42.

    | offset | size | meaning                                                          |
    |--------|------|------------------------------------------------------------------|
    | 0      | 2    | d, float16                                                       |
    | 2      | 32   | qs, codes, four a byte, value i at bits 2 (i % 4) of byte i // 4 |
    """

    block_length, block_bytes = 128, 34
