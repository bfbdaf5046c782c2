"""ComfyUI's own quantised formats, whose scales are tensors of their own.

Sources: comfy-kitchen 0.2.26 `tensor/*.py` and `backends/eager/*.py`, for asym_w4a8_int8 0.2.40
`backends/eager/w4a8_int8.py`; for MXFP8
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf; for rotated
integers ConvRot, https://arxiv.org/abs/2512.03673. `loaders/quantizers/comfy_quant_formats.py`
brings scales into the order of the values.
"""
import dataclasses
from functools import partial

import torch

from .micro_fp4 import E2M1_DOUBLED
from .row_layout import INT8_CODES, Codes, Numbers, RowFamily, RowLayout

E2M1 = tuple(value / 2 for value in E2M1_DOUBLED)
SIGNED = (*range(8), *range(-8, 0))  # codes of four bits in two's complement
LESS_EIGHT = tuple(range(-8, 8))
# of a normal distribution, the largest of a group being 1
NORMAL = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671)
MXFP8_GROUP, NVFP4_GROUP, AWQ_GROUP = 32, 16, 64
ROTATION, LEVEL_GROUP = 256, 16


def in_groups(codes: Codes, columns: int, group: int, **more) -> RowLayout:
    """Returns a layout of groups of some columns, of 0 columns for a whole row."""
    return RowLayout(columns, codes, groups=columns // (group or columns), **more)


def nvfp4(order: str, columns: int, group: int, **more) -> RowLayout:
    """Returns a layout of nvfp4, whose scales are bytes times the file's one number, which each row
    has."""
    more = {"row_scale": "multiply", "padding": NVFP4_GROUP} | more
    return in_groups(Codes(4, order, E2M1), columns, group, scale=Numbers("e4m3"), **more)


def with_addend(codes: Codes, kind: str, columns: int, group: int, **more) -> RowLayout:
    """Returns a layout of groups with a scale and a number that is added, both of one kind."""
    return in_groups(codes, columns, group, scale=Numbers(kind), minimum=Numbers(kind), **more)


def _rotated(codes: Codes, title: str, columns: int, rotation: int) -> RowLayout:
    return RowLayout(columns, codes, rotation=rotation, is_host_format=True, title=title)


def _levels(codes: Codes, columns: int, rotation: int, group: int,
            title: str = "asym_w4a8_int8", **more) -> RowLayout:
    return RowLayout(columns, codes, Numbers("e4m3"), columns // group, "multiply",
                     is_requantized=True, rotation=rotation, is_host_format=True,
                     title=title, **more)


def _smoothed(name: str, base: RowFamily) -> RowFamily:
    """Returns the family of a format with a factor for each column, which files have as
    `pre_quant_scale` and mean for the input of the layer."""
    return RowFamily(name, lambda *sizes: dataclasses.replace(
        base.layout(*sizes), has_column_scales=True), base.sizes)


def _turned(name: str, base: RowFamily) -> RowFamily:
    """Returns the family of a format whose values are rotated after they are scaled."""
    return RowFamily(name, lambda columns, rotation, *sizes: dataclasses.replace(
        base.layout(columns, *sizes), rotation=rotation, rotates_values=True,
        title=f"{base.example.title} convrot"), (ROTATION, *base.sizes))


def _family(name: str, layout, *sizes: int, **more) -> RowFamily:
    return RowFamily(name, partial(layout, is_host_format=True, **more), sizes)


LOW_NIBBLES = partial(Codes, 4, "low first")
E4M3, E5M2 = Codes(dtype=torch.float8_e4m3fn), Codes(dtype=torch.float8_e5m2)
INT8_ROWS = RowFamily(
    "INT8_ROWS", lambda columns: RowLayout(columns, INT8_CODES, is_host_format=True))
INT8_GROUPS = _family("INT8_GROUPS", partial(in_groups, INT8_CODES), 128)
F8_E4M3 = _family("F8_E4M3", partial(in_groups, E4M3), 0, title="float8_e4m3fn")
F8_E5M2 = _family("F8_E5M2", partial(in_groups, E5M2), 0, title="float8_e5m2")
MXFP8 = _family("MXFP8", partial(in_groups, E4M3), MXFP8_GROUP, scale=Numbers("e8m0"),
                padding=MXFP8_GROUP, title="mxfp8")
NVFP4_ROWS = _family("NVFP4_ROWS", partial(nvfp4, "high first"), NVFP4_GROUP, title="nvfp4")
# of Black Forest Labs and ModelOpt
NVFP4_LOW = _family("NVFP4_LOW", partial(nvfp4, "low first"), NVFP4_GROUP)
# base -> the same with a factor for each column
SMOOTHED = {base.name: _smoothed(name, base) for name, base in (
    ("INT8_SMOOTHED", INT8_ROWS), ("F8_SMOOTHED", F8_E4M3), ("NVFP4_SMOOTHED", NVFP4_ROWS),
    ("NVFP4_LOW_SMOOTHED", NVFP4_LOW))}
INT8_CONVROT = RowFamily("INT8_CONVROT", partial(_rotated, INT8_CODES, "int8_convrot"),
                         (ROTATION,))
INT4_CONVROT = RowFamily("INT4_CONVROT", partial(
    _rotated, LOW_NIBBLES(SIGNED), "convrot_w4a4"), (ROTATION,))
# base -> the same with `convrot`, which ComfyUI knows of INT8_ROWS only
ROTATED = {INT8_ROWS.name: INT8_CONVROT, **{base.name: _turned(name, base) for name, base in (
    ("F8_E4M3_CONVROT", F8_E4M3), ("F8_E5M2_CONVROT", F8_E5M2), ("MXFP8_CONVROT", MXFP8),
    ("NVFP4_CONVROT", NVFP4_ROWS))}}
# asym_w4a8_int8
_SIZES = ROTATION, LEVEL_GROUP
W4A8 = RowFamily("W4A8", partial(_levels, LOW_NIBBLES(NORMAL)), _SIZES)
W4A8_INTEGERS = RowFamily("W4A8_INTEGERS", partial(_levels, LOW_NIBBLES(LESS_EIGHT)), _SIZES)
W4A8_TABLE = RowFamily(
    "W4A8_TABLE", partial(_levels, LOW_NIBBLES(), has_own_numbers=True), _SIZES)
W4A8_SHIFTED, W4A8_SHIFTED_FLOAT = (
    RowFamily(name, partial(_levels, LOW_NIBBLES(LESS_EIGHT), minimum=Numbers(kind)), _SIZES)
    for name, kind in (("W4A8_SHIFTED", "bf16"), ("W4A8_SHIFTED_FLOAT", "f32 bytes")))
W6A8 = RowFamily("W6A8", partial(
    _levels, Codes(6, "planes", offset=32), title="w6a8_int8"), _SIZES)
W4A16, W4A16_HALF, W4A16_FLOAT = (
    _family(name, partial(with_addend, LOW_NIBBLES(LESS_EIGHT), kind), AWQ_GROUP)
    for name, kind in (
        ("W4A16", "bf16"), ("W4A16_HALF", "f16"), ("W4A16_FLOAT", "f32 bytes")))
