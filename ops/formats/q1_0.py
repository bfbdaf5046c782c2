"""One bit a value: the sign of a float16 scale."""
import torch

from .base import Format, Terms
from .bits import bit_table, half, lookup


class Q1_0(Format, ggml_type=41):
    """value = d where the bit is set, else -d

    | offset | size | meaning                             |
    |--------|------|-------------------------------------|
    | 0      | 2    | d, float16                          |
    | 2      | 16   | qs, value i at bit i, little endian |

    Source: `block_q1_0` in ggml-common.h, `dequantize_row_q1_0` in ggml-quants.c; gguf-py 0.19 only
    knows the sizes.
    """

    block_length, block_bytes = 128, 18

    @staticmethod
    def signs() -> torch.Tensor:
        """Returns the signs of eight values for every byte, as a table for `lookup`."""
        return bit_table(-1, 1)

    def terms(self, blocks: torch.Tensor) -> Terms:
        signs = lookup(self.constant("signs", blocks.device), blocks[:, 2:]).view(-1, 128)
        return Terms(signs, half(blocks, 0))
