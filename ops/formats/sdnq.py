"""Formats of SDNQ (https://github.com/Disty0/sdnq): codes of 1 to 8 bits, integers or small floats.

There is a family for each type of code, and one of codes that are looked up in levels of their own
for each number of bits. The layouts are those of its files; the sizes of a format are

| size          | meaning                                                                          |
|---------------|----------------------------------------------------------------------------------|
| group         | input channels that share scales; 0: all                                         |
| taps          | positions of a convolution's kernel, each of which has scales of its own         |
| rotation      | consecutive values of a row that are rotated together, a power of two; 0: none   |
| rotation_base | 2 or 4: size of the matrix whose Kronecker power, over its root, is the rotation |
| scale_type    | index in `SIDE_TYPES`                                                            |
| zero_type     | the same of zero points                                                          |

A row is the values of one output channel: input channels, and for each its taps.
"""
import torch

from ._rows import RowFormat
from .base import Side, Terms
from .bits import byte_pairs, passes_are_cheap, reinterpret, select
from .comfyui import rotation_signs

# how numbers are stored: as they are, in 16 bits times one factor, or in a byte with a table
SIDE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# bits of a code -> codes that are packed together
PACK_CODES = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}


def split_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Splits bytes into codes.

    Args:
        packed: uint8 (n, B), B a multiple of the bytes of a pack.
        bits: of a code, 1 to 8.

    Returns:
        uint8 (n, B * 8 / bits), in the order of the values.
    """
    if bits == 8:
        return packed
    if bits == 4:
        words = packed.to(torch.int16)  # one pass over words is cheaper than two over bytes
        return (words | words << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    if not passes_are_cheap(packed.device):
        packed = packed.int()  # some Intel GPUs crash on shifts of bytes
    if bits in (1, 2):
        fields = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
        return torch.stack(fields, -1).view(len(packed), -1).to(torch.uint8)
    columns = packed.reshape(len(packed), -1, PACK_CODES[bits] * bits // 8).unbind(-1)
    low, high = [byte & (1 << bits) - 1 for byte in columns], [byte >> bits for byte in columns]
    if bits == 3:  # `high` has a second code, and above it two or three bits of the last two codes
        low += [byte & 7 for byte in high]
        first, second, third = (byte >> 6 for byte in columns)
        low += [first | (third & 1) << 2, second | (third & 2) << 1]
    elif bits == 5:
        low += [high[0] | (high[3] & 3) << 3, high[1] | (high[4] & 3) << 3,
                high[2] | (high[3] >> 2) << 4 | (high[4] >> 2) << 3]
    elif bits == 6:
        low.append(high[0] << 4 | high[1] << 2 | high[2])
    else:
        last = high[0] << 6
        for shift, byte in zip(range(5, -1, -1), high[1:]):
            last |= byte << shift
        low.append(last)
    return torch.stack(low, -1).view(len(packed), -1).to(torch.uint8)


def number_sides(index: int, count: int) -> tuple[Side, ...]:
    """Returns the sides that hold `count` numbers of a block in the type `SIDE_TYPES[index]`."""
    dtype = SIDE_TYPES[index]
    if dtype == torch.float32:
        return (Side(dtype, count),)
    factors = 256 if dtype == torch.uint8 else 1
    return Side(torch.uint8, count * dtype.itemsize), Side(torch.float32, factors, is_shared=True)


def read_numbers(index: int, sides: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the numbers of the sides of `number_sides`, float32, flat."""
    dtype = SIDE_TYPES[index]
    if dtype == torch.float32:
        return sides[0]
    if dtype == torch.uint8:
        return select(sides[1], sides[0])
    return reinterpret(sides[0], dtype).float() * sides[1]


class SDNQ(RowFormat):
    """value = number of a code * scale + zero point, then rotated.

    | tensors    | dtype                    | meaning                                       |
    |------------|--------------------------|-----------------------------------------------|
    | packed     | uint8                    | codes, see `split_codes`                      |
    | scale      | float32, or uint8: bytes | (rows, groups, taps); then, unless these are  |
    |            |                          | float32, a shared float32 (1,), their factor, |
    |            |                          | or (256,), the scale of each byte             |
    | zero point | likewise                 | only of families with `has_zeros`             |

    Attributes:
        has_zeros: whether there are zero points.
        label: the name of the type for people.
    """

    sizes = ("group", "taps", "rotation", "rotation_base", "scale_type", "zero_type")
    has_zeros: bool
    label = "SDNQ"
    taps = 1
    rotation = 0
    rotation_base = 2
    scale_type = 0
    zero_type = 0

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        group, taps, _, _, scale_type, zero_type = sizes
        scales = columns // (group or columns // taps)
        sides = number_sides(scale_type, scales)
        return sides + number_sides(zero_type, scales) if cls.has_zeros else sides

    @classmethod
    def numbers(cls, packed: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of some rows (n, B), uint8, int8 or float32 of (n, K)."""
        raise NotImplementedError

    @classmethod
    def shape_of(cls, rows: int) -> tuple[int, ...]:
        """Returns the shape of the numbers of some rows: rows, groups, channels, taps."""
        group = cls.group or cls.block_length // cls.taps
        return rows, -1, group, cls.taps

    @classmethod
    def scaled_terms(cls, packed: torch.Tensor, *sides: torch.Tensor) -> Terms:
        """Returns the terms of some rows before they are rotated."""
        shape = cls.shape_of(len(packed))
        split = len(number_sides(cls.scale_type, 1))
        scales = read_numbers(cls.scale_type, sides[:split]).view(len(packed), -1, 1, cls.taps)
        minima = None
        if cls.has_zeros:
            zeros = read_numbers(cls.zero_type, sides[split:])
            minima = -zeros.view(len(packed), -1, 1, cls.taps)
        return Terms(cls.numbers(packed).view(shape), scales, minima)

    @classmethod
    def terms(cls, packed: torch.Tensor, *sides: torch.Tensor) -> Terms:
        terms = cls.scaled_terms(packed, *sides)
        if not cls.rotation:
            return terms
        values = torch.empty((len(packed), cls.block_length), dtype=torch.float32,
                             device=packed.device)
        terms.write(values)
        return Terms(cls.rotate(values), values.new_full((), cls.rotation**-0.5))

    @classmethod
    def rotate(cls, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows (n, K) times the rotation times the root of its size, float32."""
        signs = rotation_signs(cls.rotation, rows.device, cls.rotation_base)
        return (rows.reshape(-1, cls.rotation) @ signs).view(rows.shape)

    @classmethod
    def unrotated(cls, rows: torch.Tensor) -> torch.Tensor:
        if not cls.rotation:
            return rows
        return cls.rotate(rows.float()).mul_(cls.rotation**-0.5)


class SDNQInteger(SDNQ):
    """Codes are integers from 0 on with zero points, or signed ones from -2**(bits - 1) on."""

    @classmethod
    def numbers(cls, packed: torch.Tensor) -> torch.Tensor:
        codes = split_codes(packed, cls.bits)
        if cls.has_zeros:
            return codes
        return (codes if cls.bits == 8 else codes + 256 - 2**(cls.bits - 1)).view(torch.int8)


class SDNQFloat(SDNQ):
    """Codes are small floats, or floats of 8 bits of torch.

    Up to version 0.2.1 SDNQ read floats of an exponent of 0 as all others.

    Attributes:
        exponent, mantissa: bits of each; 0 for floats of torch.
        dtype: of these.
        subnormals: 0 where the floats of an exponent of 0 are read as all others, except 0 itself.
    """

    sizes = (*SDNQ.sizes, "subnormals")
    exponent = 0
    mantissa = 0
    dtype: torch.dtype
    subnormals = 1

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return super().sides_of(columns, *sizes[:-1])

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        """Returns the number of each code, float32 (2**bits,)."""
        if not cls.exponent:
            return torch.arange(256).to(torch.uint8).view(cls.dtype).float()
        return torch.tensor(float_values(cls.exponent, cls.mantissa, not cls.has_zeros,
                                         bool(cls.subnormals)), dtype=torch.float32)

    @classmethod
    def number_pairs(cls) -> torch.Tensor:
        """Returns the two numbers of each byte of codes of 4 bits, packed in int64 (256,)."""
        return byte_pairs(cls.code_numbers())

    @classmethod
    def numbers(cls, packed: torch.Tensor) -> torch.Tensor:
        if cls.bits == 4:
            pairs = select(cls.constant("number_pairs", packed.device), packed)
            return pairs.view(torch.float32).view(len(packed), -1)
        codes = split_codes(packed, cls.bits)
        return select(cls.constant("code_numbers", packed.device), codes).view(codes.shape)


class SDNQCodebook(SDNQ):
    """value = the level that a code selects, then rotated.

    The tensors are those of `SDNQ`, with the levels of each group, (rows, groups, levels, taps), in
    place of its scales.

    Attributes:
        levels: of a group.
    """

    has_zeros = False
    levels: int

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return tuple(side if side.is_shared else side._replace(count=side.count * cls.levels)
                     for side in super().sides_of(columns, *sizes))

    @classmethod
    def scaled_terms(cls, packed: torch.Tensor, *sides: torch.Tensor) -> Terms:
        shape = (len(packed), -1, cls.levels, cls.taps)
        levels = read_numbers(cls.scale_type, sides).view(shape)
        codes = split_codes(packed, cls.bits).view(cls.shape_of(len(packed))).long()
        values = levels.expand(-1, codes.shape[1], -1, -1).gather(2, codes)
        return Terms(values, values.new_ones(()))


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


def _types() -> dict[str, type[SDNQ]]:
    """Returns the families of types of at most 8 bits, by the names that SDNQ's files have."""
    families = {}

    def add(name: str, base: type[SDNQ], bits: int, has_zeros: bool, **more):
        families[name] = type(f"SDNQ_{name.upper()}", (base,), {
            "bits": bits, "has_zeros": has_zeros, "label": f"SDNQ {name}",
            "__doc__": f"SDNQ's {name}.", "__module__": __name__, **more})

    for bits in range(2, 9):
        add(f"int{bits}", SDNQInteger, bits, False)
    for bits in range(1, 9):
        add(f"uint{bits}", SDNQInteger, bits, True)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        add(str(dtype).removeprefix("torch."), SDNQFloat, 8, False, dtype=dtype)
    for bits in range(1, 9):
        for is_signed in (True, False):
            for exponent in range(1, min(5, bits - is_signed) + 1):
                mantissa = bits - is_signed - exponent
                name = f"float{bits}_e{exponent}m{mantissa}fn{'' if is_signed else 'u'}"
                # which are torch's, with NaN
                name += "_sdnq" if name == "float8_e4m3fn" else ""
                add(name, SDNQFloat, bits, not is_signed, exponent=exponent, mantissa=mantissa)
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
CODEBOOKS: dict[int, type[SDNQCodebook]] = {
    bits: type(f"SDNQ_CODEBOOK{bits}", (SDNQCodebook,), {
        "bits": bits, "levels": 2**bits, "label": f"SDNQ uint{bits} codebook",
        "__doc__": f"SDNQ's codebooks of uint{bits}.", "__module__": __name__})
    for bits in range(1, 9)
}
