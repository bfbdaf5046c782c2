"""Formats of SVDQuant (https://arxiv.org/abs/2411.05007) and of the AWQ that goes with it.

A weight of SVDQuant is a low rank (`low_rank_and_joined`) plus codes of 4 bits, whose columns are
divided by the factors that its layer's input is divided by. Sources of the formulas:
deepcompressor-toolkit 0.1.0 `backend/nunchaku/utils.py`, `backend/tinychat/utils.py`.
`loaders/quantizers/nunchaku_tiles.py` brings codes and scales into the order of the values.
"""
from functools import partial

from .comfyui import AWQ_GROUP, LOW_NIBBLES, NVFP4_GROUP, SIGNED, in_groups, nvfp4, with_addend
from .row_layout import Numbers, RowFamily

INT4_GROUP, PADDING = 64, 128
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
