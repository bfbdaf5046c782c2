"""Formats of SVDQuant (https://arxiv.org/abs/2411.05007) and of the AWQ that goes with it.

A weight of SVDQuant is a low rank (`low_rank_and_joined`) plus codes of 4 bits, whose columns are
divided by the factors that its layer's input is divided by. Sources of the formulas:
deepcompressor-toolkit 0.1.0 `backend/nunchaku/utils.py`, `backend/tinychat/utils.py`.
`loaders/quantizers/nunchaku_tiles.py` brings codes and scales into the order of the values.
"""
import torch

from .base import Side, Terms
from .bits import reinterpret
from .comfyui import INT4_CONVROT, NVFP4_LOW_SMOOTHED, W4A16, Nibbles


class SVDQUANT_INT4(Nibbles):
    """value = code * (scale * scale_2) * scale_3, one scale for 64 columns.

    | tensor  | dtype, shape           | meaning                                     |
    |---------|------------------------|---------------------------------------------|
    | packed  | uint8 (rows * K / 2,)  | signed integers, the low nibble first       |
    | scale   | uint8                  | bytes of rows * K / 64 `side_dtype`         |
    | scale_2 | float32 (rows,)        | of a row                                    |
    | scale_3 | float32 (K,)           | of a column: 1 / the divisor of the input   |
    """

    of_host = False
    label = "SVDQuant int4"
    group = 64
    padding = 128
    values = INT4_CONVROT.values
    side_dtype = torch.bfloat16

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return (Side(torch.uint8, columns // sizes[0] * cls.side_dtype.itemsize),
                Side(torch.float32), Side(torch.float32, columns, is_shared=True))

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor,
              scale_3: torch.Tensor) -> Terms:
        scales = reinterpret(scale, cls.side_dtype).float().view(len(codes), -1, 1)
        values = cls.numbers(codes).view(len(codes), -1, cls.group)
        values *= scales * scale_2.view(-1, 1, 1)
        return Terms(values.view(len(codes), -1), scale_3)


class SVDQUANT_INT4_HALF(SVDQUANT_INT4):
    """The same with scales in float16."""

    side_dtype = torch.float16


class SVDQUANT_NVFP4(NVFP4_LOW_SMOOTHED):
    """ModelOpt's nvfp4, `scale_2` being of a row and `scale_3` of a column as in SVDQUANT_INT4."""

    of_host = False
    label = "SVDQuant nvfp4"
    padding = 128


class AWQ_INT4(W4A16):
    """value = code * scale + zero, both of 64 columns or of another number.

    The tensors are those of `W4A16`.
    """

    of_host = False
    label = "AWQ int4"
    values = tuple(range(16))


class AWQ_INT4_HALF(AWQ_INT4):
    """The same with scales and zeros in float16."""

    side_dtype = torch.float16
