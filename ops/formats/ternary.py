"""The ternary formats of BitNet: 256 values of -d, 0 or d.

Sources: `block_tq*_0` in ggml-common.h, `dequantize_row_tq*_0` in ggml-quants.c, gguf-py 0.19
`quants.py`.
"""
import torch

from .base import Format, Terms, inverse, round_half_away
from .bits import bit_planes, half, half_bytes, join_planes


def _digits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns d, float32 (n, 1), and digits 0..2, uint8, as ggml's reference: d is the peak."""
    d = values.abs().amax(-1, keepdim=True)
    return d, round_half_away(values * inverse(d)).add_(1).view(torch.uint8)


class TQ1_0(Format, ggml_type=34):
    """value = d * (digit - 1)

    A byte b holds base-3 digits: digit i is (b * 3**i mod 256) * 3 >> 8.

    | offset | size | meaning                                                               |
    |--------|------|-----------------------------------------------------------------------|
    | 0      | 32   | values 0..159: digit i of the bytes holds values 32 i..32 i + 31      |
    | 32     | 16   | values 160..239: digit i of the bytes holds 16 adjacent values        |
    | 48     | 4    | values 240..255: digit i of the bytes, i < 4, holds 4 adjacent values |
    | 52     | 2    | d, float16                                                            |
    """

    block_length, block_bytes = 256, 54

    @staticmethod
    def powers() -> torch.Tensor:
        """Returns 3**i, uint8 (5, 1), the factors that bring each digit to the top of a byte."""
        return torch.tensor([[3**i] for i in range(5)], dtype=torch.uint8)

    def terms(self, blocks: torch.Tensor) -> Terms:
        products = blocks[:, :52].unsqueeze(1) * self.constant("powers", blocks.device)
        digits = (products > 170).view(torch.int8).sub_((products < 86).view(torch.int8))
        runs = digits[..., :32], digits[..., 32:48], digits[:, :4, 48:]
        return Terms(torch.cat([run.flatten(1) for run in runs], -1), half(blocks, 52))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        d, digits = _digits(values)

        def numbers(first: int, last: int, width: int) -> torch.Tensor:
            """Returns base-3 numbers of five places, whose digits are runs of `width` digits."""
            runs = digits[:, first:last].int().view(len(digits), -1, width)
            total = torch.zeros_like(runs[:, 0])
            for place in range(runs.shape[1]):
                total += runs[:, place] * 3**(4 - place)
            return total

        packed = torch.cat([numbers(0, 160, 32), numbers(160, 240, 16), numbers(240, 256, 4)], 1)
        return torch.cat([((packed * 256 + 242) // 243).to(torch.uint8), half_bytes(d)], 1)


class TQ2_0(Format, ggml_type=35):
    """value = d * (code - 1)

    | offset | size | meaning                                                          |
    |--------|------|------------------------------------------------------------------|
    | 0      | 64   | qs, codes, four a byte; 32 bytes hold 128 values, low bits first |
    | 64     | 2    | d, float16                                                       |
    """

    block_length, block_bytes = 256, 66

    def terms(self, blocks: torch.Tensor) -> Terms:
        codes = bit_planes(blocks[:, :64].view(-1, 2, 32), 2).view(-1, 256)
        return Terms(codes.view(torch.int8).sub_(1), half(blocks, 64))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        d, codes = _digits(values)
        return torch.cat([join_planes(codes, 2, 32), half_bytes(d)], 1)
