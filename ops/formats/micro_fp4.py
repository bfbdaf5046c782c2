"""The microscaling 4-bit floats: E2M1 codes under small float scales.

As in ggml, the E2M1 values are doubled and the scales halved.

Sources: `block_mxfp4`, `block_nvfp4` in ggml-common.h, `dequantize_row_*` in ggml-quants.c, the
scale conversions in ggml-impl.h, gguf-py 0.19 `quants.py`.
"""
import math

import torch

from ._nibble_codebook import NibbleCodebook
from .base import Terms
from .bits import join_planes, select

# Code 8 is minus zero, which becomes plus zero.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class MXFP4(NibbleCodebook, ggml_type=39):
    """value = scale * values[code], scale = 2**(e - 128)

    | offset | size | meaning                                                             |
    |--------|------|---------------------------------------------------------------------|
    | 0      | 1    | e, exponent E8M0                                                    |
    | 1      | 16   | qs, codes, values 0..15 in the low nibbles, 16..31 in the high ones |
    """

    block_length, block_bytes = 32, 17
    values = E2M1_DOUBLED
    largest = torch.finfo(torch.float32).max

    @staticmethod
    def scales() -> torch.Tensor:
        """Returns the scale of every exponent, float32 (256,); the two lowest are subnormal."""
        return torch.tensor([math.ldexp(1, exponent - 128) for exponent in range(256)],
                            dtype=torch.float32)

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales = select(self.constant("scales", blocks.device), blocks[:, 0])
        return Terms(self.code_values(blocks[:, 1:]), scales.unsqueeze(-1))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        peak = values.abs().amax(-1, keepdim=True)
        exponents = (peak.log2().floor() + 125).clamp(0, 255)
        exponents = torch.where(peak > 0, exponents, 0).to(torch.uint8)
        scales = self.constant("scales", values.device)[exponents.int()].unsqueeze(-1)
        levels = scales * torch.tensor(self.values, dtype=torch.float32, device=values.device)
        codes = (levels - values.unsqueeze(-1)).abs().argmin(-1).to(torch.uint8)
        return torch.cat([exponents, join_planes(codes, 4, 16)], 1)


class NVFP4(NibbleCodebook, ggml_type=40):
    """value = scale * values[code], one scale per 16 values

    | offset | size | meaning                                                            |
    |--------|------|--------------------------------------------------------------------|
    | 0      | 4    | scales, unsigned E4M3                                              |
    | 4      | 32   | qs, codes; the low nibbles of 8 bytes hold 8 values, then the high |
    """

    block_length, block_bytes = 64, 36
    values = E2M1_DOUBLED

    @staticmethod
    def scales() -> torch.Tensor:
        """Returns half the value of every E4M3 byte without its sign, float32 (256,); NaN is 0."""
        def half_value(byte: int) -> float:
            exponent, mantissa = byte >> 3 & 15, byte & 7
            if byte == 0x7F:  # NaN
                return 0.0
            if exponent == 0:
                return math.ldexp(mantissa, -10)
            return math.ldexp(8 + mantissa, exponent - 11)

        return torch.tensor(list(map(half_value, range(256))), dtype=torch.float32)

    def terms(self, blocks: torch.Tensor) -> Terms:
        scales = select(self.constant("scales", blocks.device), blocks[:, :4])
        return Terms(self.code_values(blocks[:, 4:].view(-1, 4, 8)), scales.view(-1, 4, 1))
