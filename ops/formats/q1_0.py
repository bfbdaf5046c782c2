"""One bit a value: the sign of a float16 scale."""
import torch

from ..format import Format, bit_table, half, lookup


class Q1_0(Format, ggml_type=41):
    """value = d where the bit is set, else -d

    | offset | size | meaning                             |
    |--------|------|-------------------------------------|
    | 0      | 2    | d, float16                          |
    | 2      | 16   | qs, value i at bit i, little endian |

    Source: `block_q1_0` in ggml-common.h, `dequantize_row_q1_0` in ggml-quants.c; gguf-py 0.19 only knows the sizes.
    """

    block_length, block_bytes = 128, 18

    @staticmethod
    def signs() -> torch.Tensor:
        return bit_table(-1, 1)

    @classmethod
    def unpack(cls, blocks: torch.Tensor) -> torch.Tensor:
        signs = lookup(cls.constant("signs", blocks.device), blocks[:, 2:]).view(-1, 128)
        return signs.float().mul_(half(blocks, 0))
