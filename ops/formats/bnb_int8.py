"""bitsandbytes' int8 format (LLM.int8, https://arxiv.org/abs/2208.07339), as its files hold
weights.

Source: bitsandbytes 0.50 `nn/modules.py` (`SCB`), `backends/default/ops.py`
(`int8_vectorwise_quant`).
"""
import torch

from ..format import FORMATS, Format, Terms


class INT8(Format):
    """value = code * scale, one scale a row: a block is a row.

    | tensor | dtype, shape         | meaning                                         |
    |--------|----------------------|-------------------------------------------------|
    | packed | uint8 (rows * K,)    | the bytes of int8 codes                         |
    | scale  | float32 (rows,)      | largest magnitude of the row (`SCB`) over 127   |
    """

    scales_apart = True

    @classmethod
    def of_columns(cls, columns: int) -> type["INT8"]:
        """The format of weights of [N, columns]."""
        name = f"INT8_{columns}"
        return FORMATS.get(name) or type(
            name, (INT8,), {"block_length": columns, "block_bytes": columns}
        )

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
        """codes: uint8 (n, block_length), scale: float32 (n,)."""
        return Terms(codes.view(torch.int8), scale.unsqueeze(-1))
