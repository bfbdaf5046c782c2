"""bitsandbytes' int8 format as in its files (LLM.int8, https://arxiv.org/abs/2208.07339).

Source: bitsandbytes 0.50 `nn/modules.py` (`SCB`), `backends/default/ops.py`
(`int8_vectorwise_quant`).
"""
from typing import Any

import torch

from ..format import FORMATS, Format, Terms


class INT8(Format):
    """value = code * scale, one scale a row: a block is a row.

    | tensor | dtype, shape      | meaning                                       |
    |--------|-------------------|-----------------------------------------------|
    | packed | uint8 (rows * K,) | the bytes of int8 codes                       |
    | scale  | float32 (rows,)   | largest magnitude of the row (`SCB`) over 127 |
    """

    scales_apart = True

    @classmethod
    def of_columns(cls, columns: int) -> type["INT8"]:
        """Returns the format of weights of shape (N, columns)."""
        name = f"INT8_{columns}"
        sizes = {"block_length": columns, "block_bytes": columns}
        packed_format: Any = FORMATS.get(name) or type(name, (INT8,), sizes)
        return packed_format

    @classmethod
    def blocks(cls, tensors, first, last):
        return tensors[0].view(-1, cls.block_bytes)[first:last], tensors[1][first:last]

    @classmethod
    def rows(cls, tensors, columns, index):
        return [
            tensors[0].view(-1, columns)[index],
            tensors[1].view(-1, columns // cls.block_length)[index].view(-1)
        ]

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        """Returns the terms of blocks: codes, uint8 (n, block_length), and scale, float32 (n,)."""
        return Terms(codes.view(torch.int8), scale.unsqueeze(-1))
