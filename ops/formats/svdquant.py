"""Formats of SVDQuant (https://arxiv.org/abs/2411.05007) and of the AWQ that goes with it.

A weight of SVDQuant is a low rank (`low_rank_and_joined`) plus codes of 4 bits, whose columns are
divided by the factors that its layer's input is divided by. Sources of the formulas:
deepcompressor-toolkit 0.1.0 `backend/nunchaku/utils.py`, `backend/tinychat/utils.py`.
`loaders/quantizers/nunchaku_tiles.py` brings codes and scales into the order of the values.
"""
from collections.abc import Iterable
from functools import partial

import torch

from ..low_rank import LowRank
from .base import Format, QParam
from .comfy_quant import AWQ_GROUP, LOW_NIBBLES, NVFP4_GROUP, SIGNED, in_groups, nvfp4, with_addend
from .low_rank_and_joined import Composite, DequantizeInto, without_low_rank
from .row_layout import Numbers, RowFamily

INT4_GROUP, PADDING = 64, 128
# what layers after a GELU add to their input, so that codes of the input need no sign
INPUT_SHIFT = 0.171875
SVDQUANT_INT4, SVDQUANT_INT4_HALF = (
    RowFamily(name, partial(in_groups, LOW_NIBBLES(SIGNED), scale=Numbers(kind),
                            row_scale="multiply", has_column_scales=True, padding=PADDING,
                            title="SVDQuant int4"), (INT4_GROUP,))
    for name, kind in (("SVDQUANT_INT4", "bf16"), ("SVDQUANT_INT4_HALF", "f16")))
SVDQUANT_NVFP4 = RowFamily(
    "SVDQUANT_NVFP4", partial(nvfp4, "low first", has_column_scales=True, padding=PADDING,
                              title="SVDQuant nvfp4"), (NVFP4_GROUP,))
AWQ_INT4, AWQ_INT4_HALF = (
    RowFamily(name, partial(with_addend, LOW_NIBBLES(tuple(range(16))), kind, title="AWQ int4"),
              (AWQ_GROUP,))
    for name, kind in (("AWQ_INT4", "bf16"), ("AWQ_INT4_HALF", "f16")))


class ShiftedInput(Composite):
    """value = value of `base`, for a layer whose makers add `INPUT_SHIFT` to its input.

    The float product needs no shift: what it adds is taken from the bias. A product that quantises
    the input needs it for codes without a sign, and subtracts from the bias what it adds. The
    tensors are those of `base`, then

    | tensor      | dtype, shape    | meaning                                                  |
    |-------------|-----------------|----------------------------------------------------------|
    | input_shift | float32 (rows,) | `INPUT_SHIFT` * sum of the row, without its low rank     |

    Attributes:
        base: whose block is a row.
    """

    def __init__(self, base: Format):
        self.name, self.base = f"SHIFTED_{base.name}", base
        self.block_length, self.block_bytes = base.block_length, base.block_bytes
        self.padding, self.is_host_format = base.padding, base.is_host_format
        self.qparams = *base.qparams, QParam(torch.float32, name="input_shift")

    def title(self) -> str:
        return self.base.title()

    def formats_within(self) -> Iterable[Format]:
        return self.base.formats_within()

    def without_low_rank(self, tensors: list[torch.Tensor]
                         ) -> tuple[Format, list[torch.Tensor], LowRank | None]:
        return without_low_rank(self.base, tensors[:-1])

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:
        return dequantize_into(self.base, tensors[:-1], out, first)
