"""Int8 with one scale a row: bitsandbytes' (LLM.int8, https://arxiv.org/abs/2208.07339), ComfyUI's.

Sources: bitsandbytes 0.50 `nn/modules.py` (`SCB`), `backends/default/ops.py`
(`int8_vectorwise_quant`); comfy-kitchen 0.2.26 `tensor/int8.py`.
"""
import torch

from ._rows import RowFormat
from .base import Terms


class INT8(RowFormat):
    """value = code * scale

    | tensor | dtype, shape      | meaning                                                        |
    |--------|-------------------|----------------------------------------------------------------|
    | packed | uint8 (rows * K,) | the bytes of int8 codes                                        |
    | scale  | float32 (rows,)   | of bitsandbytes: largest magnitude of the row (`SCB`) over 127 |
    """

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        """Returns the terms of blocks: codes, uint8 (n, block_length), and scale, float32 (n,)."""
        return Terms(codes.view(torch.int8), scale.unsqueeze(-1))
