"""Formats of SDNQ (https://github.com/Disty0/sdnq): codes of 1 to 8 bits, integers or small floats.

There is a family for each type of code, and one of codes that are looked up in levels of their own
for each number of bits. The layouts are those of its files; the sizes of a format are

| size          | meaning                                                                          |
|---------------|----------------------------------------------------------------------------------|
| group         | input channels that share scales; 0: all                                         |
| taps          | positions of a convolution's kernel, each of which has scales of its own         |
| rotation      | consecutive values of a row that are rotated together, a power of two; 0: none   |
| rotation_base | 2 or 4: size of the matrix whose Kronecker power, over its root, is the rotation |
| scale_type    | place in `NUMBER_TYPES`                                                          |
| zero_type     | the same of zero points, which are added                                         |
| subnormals    | only of floats; 0: floats of an exponent of 0 are read as all others, except 0   |
|               | itself, as SDNQ up to version 0.2.1 reads them                                   |

A row is the values of one output channel: input channels, and for each its taps.
"""
import functools
from collections.abc import Callable

import torch

from .row_layout import Codes, Numbers, RowFamily, RowLayout

# how numbers are stored: as they are, in 16 bits times one factor, or in a byte with a table
NUMBER_TYPES = {torch.float32: Numbers(), torch.bfloat16: Numbers("bf16", has_factor=True),
                torch.float16: Numbers("f16", has_factor=True), torch.uint8: Numbers("bytes")}
ROTATION_BASE = 2
SIZES = (0, 1, 0, ROTATION_BASE, 0, 0)


def _layout(codes: Codes, title: str, has_zeros: bool, levels: int, columns: int, group: int,
            taps: int, rotation: int, rotation_base: int, scale_type: int,
            zero_type: int) -> RowLayout:
    numbers, channels = tuple(NUMBER_TYPES.values()), columns // taps
    return RowLayout(
        columns, codes, numbers[scale_type], channels // (group or channels),
        minimum=numbers[zero_type] if has_zeros else None, levels=levels, taps=taps,
        rotation=rotation, rotation_base=rotation_base, rotates_values=True, title=title)


def _float_layout(codes: Callable[[bool], Codes], title: str, has_zeros: bool, columns: int,
                  *sizes: int) -> RowLayout:
    return _layout(codes(bool(sizes[-1])), title, has_zeros, 0, columns, *sizes[:-1])


def float_values(exponent: int, mantissa: int, is_signed: bool,
                 has_subnormals: bool) -> tuple[float, ...]:
    """Returns the number of each code of a small float without infinities and NaN.

    Args:
        exponent, mantissa: bits of each.
        is_signed: whether a sign is above them.
        has_subnormals: whether floats of an exponent of 0 have no implicit bit.
    """
    bias, one = 2**(exponent - 1) - 1, 2**mantissa
    values = []
    for code in range(2**(exponent + mantissa)):
        power, fraction = code >> mantissa, code % one
        if has_subnormals and power == 0:
            power = 1
        elif code or exponent == 1:
            fraction += one
        values.append(fraction * 2.0**(power - bias - mantissa))
    return (*values, *(-value for value in values)) if is_signed else tuple(values)


def _integer_codes(bits: int, is_signed: bool) -> Codes:
    if bits == 8:
        return Codes(dtype=torch.int8 if is_signed else torch.uint8)
    return Codes(bits, "packs", offset=1 << bits - 1 if is_signed else 0)


def _float_codes(exponent: int, mantissa: int, is_signed: bool, has_subnormals: bool) -> Codes:
    bits = exponent + mantissa + is_signed
    order = {4: "low first", 8: "bytes"}.get(bits, "packs")
    return Codes(bits, order, float_values(exponent, mantissa, is_signed, has_subnormals))


def _types() -> dict[str, RowFamily]:
    """Returns the families of types of at most 8 bits, by the names that SDNQ's files have."""
    families = {}

    def add(name: str, layout: Callable[..., RowLayout], codes, has_zeros: bool, *more: int):
        families[name] = RowFamily(
            f"SDNQ_{name.upper()}",
            functools.partial(layout, codes, f"SDNQ {name}", has_zeros, *more),
            SIZES if more else (*SIZES, 1))

    for bits in range(2, 9):
        add(f"int{bits}", _layout, _integer_codes(bits, True), False, 0)
    for bits in range(1, 9):
        add(f"uint{bits}", _layout, _integer_codes(bits, False), True, 0)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes = Codes(dtype=dtype)
        add(str(dtype).removeprefix("torch."), _float_layout, lambda _, codes=codes: codes, False)
    for bits in range(1, 9):
        for is_signed in (True, False):
            for exponent in range(1, min(5, bits - is_signed) + 1):
                mantissa = bits - is_signed - exponent
                name = f"float{bits}_e{exponent}m{mantissa}fn{'' if is_signed else 'u'}"
                # which are torch's, with NaN
                name += "_sdnq" if name == "float8_e4m3fn" else ""
                add(name, _float_layout,
                    functools.partial(_float_codes, exponent, mantissa, is_signed), not is_signed)
    return families


# name of a type -> family of its formats
SDNQ_TYPES = _types()
# other names of types
ALIASES = {
    "int1": "uint1", "bool": "uint1", "fp1": "float1_e1m0fnu", "ufp1": "float1_e1m0fnu",
    "fp2": "float2_e1m0fn", "fp3": "float3_e1m1fn", "fp4": "float4_e2m1fn",
    "fp5": "float5_e2m2fn", "fp6": "float6_e3m2fn", "fp7": "float7_e3m3fn", "fp8": "float8_e4m3fn",
    "ufp2": "float2_e1m1fnu", "ufp3": "float3_e1m2fnu", "ufp4": "float4_e2m2fnu",
    "ufp5": "float5_e2m3fnu", "ufp6": "float6_e3m3fnu", "ufp7": "float7_e3m4fnu",
    "ufp8": "float8_e4m4fnu",
}
# bits -> family of formats with levels
CODEBOOKS = {
    bits: RowFamily(f"SDNQ_CODEBOOK{bits}", functools.partial(
        _layout, Codes(bits, "packs"), f"SDNQ uint{bits} codebook", False, 2**bits), SIZES)
    for bits in range(1, 9)
}
