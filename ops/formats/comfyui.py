"""ComfyUI's own quantised formats, whose scales are tensors of their own.

Sources: comfy-kitchen 0.2.26 `tensor/*.py` and `backends/eager/*.py`; for MXFP8
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
`loaders/quantizers/comfyui.py` brings scales into the order of the values.
"""
import math

import torch

from ..lasting_memory import cached_on_device
from ._rows import RowFormat
from .base import Side, Terms
from .bits import bit_planes, byte_pairs, reinterpret, select, split_bits
from .bnb_int8 import INT8
from .micro_fp4 import E2M1_DOUBLED

# size -> the matrix whose Kronecker powers, over their roots, are rotations
HADAMARD = {2: ((1, 1), (1, -1)), 4: ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))}


def signed_bytes() -> torch.Tensor:
    """Returns the integer of each byte, float32 (256,)."""
    return torch.arange(256).to(torch.uint8).view(torch.int8).float()


class Nibbles(RowFormat):
    """The base of formats with two codes in a byte, each of which stands for a number.

    Attributes:
        values: the number of each code.
        is_high_first: whether the high nibble of a byte comes first.
    """

    of_host = True
    bits = 4
    values: tuple[float, ...]
    is_high_first = False

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        """Returns the number of each code, float32 (16,)."""
        return torch.tensor(cls.values, dtype=torch.float32)

    @classmethod
    def number_pairs(cls) -> torch.Tensor:
        """Returns the two numbers of each byte as float32, packed in int64 (256,)."""
        return byte_pairs(cls.code_numbers(), cls.is_high_first)

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of some blocks, float32 (n, K)."""
        pairs = select(cls.constant("number_pairs", codes.device), codes)
        return pairs.view(torch.float32).view(len(codes), -1)


class INT8_ROWS(INT8):
    """ComfyUI's int8_tensorwise."""

    of_host = True


class GroupScaled(RowFormat):
    """value = number of a code * scale, one scale for each group of columns of a row, or for all.

    | tensor | dtype, shape                    | meaning |
    |--------|---------------------------------|---------|
    | packed | uint8 (rows * K,)               | codes   |
    | scale  | float32 (rows * groups a row,)  |         |
    """

    of_host = True

    @classmethod
    def sides_of(cls, columns: int, group: int) -> tuple[Side, ...]:
        return (Side(torch.float32, columns // (group or columns)),)

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        """Returns the number of each code, float32 (256,)."""
        raise NotImplementedError

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of some codes, in any shape."""
        raise NotImplementedError

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        shape = (len(codes), -1, cls.group or cls.block_length)
        return Terms(cls.numbers(codes).view(shape), scale.view(len(codes), -1, 1))


class INT8_GROUPS(GroupScaled):
    """ComfyUI's int8_blockwise."""

    group = 128

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        return signed_bytes()

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8)


class Float8(GroupScaled):
    """Codes are floats of a byte.

    They are looked up, so that no device needs to know the dtype, except for those of CUDA and HIP,
    which all convert it.
    """

    dtype: torch.dtype

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        return torch.arange(256).to(torch.uint8).view(cls.dtype).float()

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        if codes.device.type == "cuda":
            return codes.view(cls.dtype).float()
        return select(cls.constant("code_numbers", codes.device), codes)


class F8_E4M3(Float8):
    """ComfyUI's float8_e4m3fn."""

    dtype = torch.float8_e4m3fn


class F8_E5M2(Float8):
    """ComfyUI's float8_e5m2."""

    dtype = torch.float8_e5m2


class MXFP8(Float8):
    """value = float of a byte * 2**(e - 127), one exponent for 32 columns; e = 0 is the scale 0.

    | tensor | dtype, shape           | meaning            |
    |--------|------------------------|--------------------|
    | packed | uint8 (rows * K,)      | bytes of E4M3      |
    | scale  | uint8 (rows * K / 32,) | e, exponents E8M0  |
    """

    dtype = torch.float8_e4m3fn
    group = padding = 32

    @classmethod
    def sides_of(cls, columns: int, group: int) -> tuple[Side, ...]:
        return (Side(torch.uint8, columns // group),)

    @classmethod
    def scales(cls) -> torch.Tensor:
        """Returns the scale of each exponent, float32 (256,)."""
        return torch.tensor([0.0, *(math.ldexp(1, e - 127) for e in range(1, 255)), math.inf],
                            dtype=torch.float32)

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        return super().terms(codes, select(cls.constant("scales", codes.device), scale))


class NVFP4_ROWS(Nibbles):
    """value = float of a code * (scale_2 * scale), one scale for 16 columns: ComfyUI's nvfp4.

    | tensor  | dtype, shape           | meaning                                           |
    |---------|------------------------|---------------------------------------------------|
    | packed  | uint8 (rows * K / 2,)  | codes E2M1, two a byte, the high nibble first     |
    | scale   | uint8 (rows * K / 16,) | bytes of E4M3                                     |
    | scale_2 | float32 (rows,)        | the file's only one for each of rows              |
    """

    group = padding = 16
    values = tuple(value / 2 for value in E2M1_DOUBLED)
    is_high_first = True
    scales = F8_E4M3.code_numbers  # of the bytes of `scale`

    @classmethod
    def sides_of(cls, columns: int, group: int) -> tuple[Side, ...]:
        return Side(torch.uint8, columns // group), Side(torch.float32)

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> Terms:
        scales = select(cls.constant("scales", codes.device), scale)
        scales = scales.view(len(codes), -1, 1) * scale_2.view(-1, 1, 1)
        return Terms(cls.numbers(codes).view(len(codes), -1, cls.group), scales)


class NVFP4_LOW(NVFP4_ROWS):
    """The same with the low nibble first: nvfp4 of Black Forest Labs and ModelOpt."""

    is_high_first = False


class Smoothed(RowFormat):
    """The values of another format times a number for each column, the last of `sides`.

    Files have it as `pre_quant_scale` and mean it for the input of the layer, float32 (K,).

    Attributes:
        base: the other format.
    """

    of_host = True
    base: type[RowFormat]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "base" in vars(cls):
            cls.bits, cls.group, cls.padding = cls.base.bits, cls.base.group, cls.base.padding

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return (*cls.base.sides_of(columns, *sizes),
                Side(torch.float32, columns, is_shared=True))

    @classmethod
    def terms(cls, *blocks: torch.Tensor) -> Terms:
        terms = cls.base.of_columns(cls.block_length, cls.group).terms(*blocks[:-1])
        values = terms.codes * terms.scales
        return Terms(values.view(len(values), -1), blocks[-1])


class INT8_SMOOTHED(Smoothed):
    """ModelOpt's int8."""

    base = INT8_ROWS


class F8_SMOOTHED(Smoothed):
    """ModelOpt's fp8."""

    base = F8_E4M3


class NVFP4_SMOOTHED(Smoothed):
    """ComfyUI's nvfp4."""

    base = NVFP4_ROWS


class NVFP4_LOW_SMOOTHED(Smoothed):
    """ModelOpt's nvfp4."""

    base = NVFP4_LOW


@cached_on_device
def rotation_signs(size: int, device: torch.device, base: int = 4) -> torch.Tensor:
    """Returns a rotation times the root of its size, float32 (size, size), symmetric, of +-1.

    Args:
        size: of the rotation, a power of `base`.
        device: of the result.
        base: a key of `HADAMARD`.
    """
    power = torch.ones((1, 1), dtype=torch.float32)
    matrix = torch.tensor(HADAMARD[base], dtype=torch.float32)
    while len(power) < size:
        power = torch.kron(power, matrix)
    return power.to(device)


class Rotated(RowFormat):
    """value = scale * (codes of a group of columns times a rotation), one scale a row.

    The rotation is symmetric, orthogonal and the Kronecker power of `HADAMARD[4] / 2`, whose
    elements are +-1 over a power of two. It turns integers into sums that float32 holds exactly, so
    that a value is rounded once, whatever the order of the sum (ConvRot,
    https://arxiv.org/abs/2512.03673).

    | tensor | dtype, shape               | meaning                      |
    |--------|----------------------------|------------------------------|
    | packed | uint8 (rows * K * bits / 8,) | signed integers            |
    | scale  | float32 (rows,)            | of a row                     |
    """

    of_host = True
    group = 256

    @classmethod
    def integers(cls, codes: torch.Tensor) -> torch.Tensor:
        """Returns the codes of blocks as float32, at most 127 in magnitude."""
        raise NotImplementedError

    @classmethod
    def rotate(cls, values: torch.Tensor) -> torch.Tensor:
        """Returns rows times the rotation times the root of its size, float32, of their shape."""
        signs = rotation_signs(cls.group, values.device)
        return (values.view(-1, cls.group) @ signs).view(values.shape)

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        return Terms(cls.rotate(cls.integers(codes)), scale.unsqueeze(-1) / cls.group**0.5)


class INT8_CONVROT(Rotated):
    """ComfyUI's int8_tensorwise with `convrot`."""

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        """Returns the integer of each code, float32 (256,)."""
        return signed_bytes()

    @classmethod
    def integers(cls, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8).float()


class INT4_CONVROT(Nibbles, Rotated):
    """ComfyUI's convrot_w4a4."""

    values = (*range(8), *range(-8, 0))

    @classmethod
    def integers(cls, codes: torch.Tensor) -> torch.Tensor:
        return cls.numbers(codes)


class RotatedLevels(Rotated):
    """ComfyUI's asym_w4a8_int8: an integer is the level of a code times the scale of its columns.

    The product is rounded to nearest, ties to even, and limited to 127 in magnitude (comfy-kitchen
    0.2.40 `backends/eager/w4a8_int8.py`).

    | tensor  | dtype, shape                    | meaning        |
    |---------|---------------------------------|----------------|
    | packed  | uint8 (rows * K * bits / 8,)    | codes          |
    | scale   | uint8 (rows * K / level_group,) | bytes of E4M3  |
    | scale_2 | float32 (rows,)                 | of a row       |

    Attributes:
        level_group: columns that share a scale.
    """

    level_group = 16
    sizes = ("group", "level_group")
    scales = F8_E4M3.code_numbers  # of the bytes of `scale`

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return Side(torch.uint8, columns // sizes[1]), Side(torch.float32)

    @classmethod
    def levels(cls, codes: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        """Returns the level of each code, float32 (n, K).

        Args:
            codes: of n blocks.
            sides: of the blocks, from the third on.
        """
        raise NotImplementedError

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor,
              *sides: torch.Tensor) -> Terms:
        scales = select(cls.constant("scales", codes.device), scale)
        levels = cls.levels(codes, *sides).view(len(codes), -1, cls.level_group)
        integers = (levels * scales.view(len(codes), -1, 1)).round_().clamp_(-127, 127)
        return Terms(cls.rotate(integers.view(len(codes), -1)),
                     scale_2.unsqueeze(-1) / cls.group**0.5)


class FixedLevels(Nibbles, RotatedLevels):
    """Codes of 4 bits whose levels all weights have in common."""

    @classmethod
    def levels(cls, codes: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        return cls.numbers(codes)


class W4A8(FixedLevels):
    """The levels are those of a normal distribution, the largest of a group being 1."""

    values = (
        -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
        0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671)


class W4A8_INTEGERS(FixedLevels):
    """The levels are integers."""

    values = tuple(range(-8, 8))


class W4A8_TABLE(RotatedLevels):
    """The levels are the weight's own: `scale_3`, float32 (16,)."""

    bits = 4

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return *super().sides_of(columns, *sizes), Side(torch.float32, 16, is_shared=True)

    @classmethod
    def levels(cls, codes: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        return select(sides[0], split_bits(codes, 4, 2))


class W4A8_SHIFTED(FixedLevels):
    """A number is added to all values of `level_group` columns before they are rotated.

    `scale_3`, uint8, has the bytes of these numbers, rows * K / level_group of `shift_dtype`.
    """

    values = W4A8_INTEGERS.values
    shift_dtype = torch.bfloat16

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        shifts = Side(torch.uint8, columns // sizes[1] * cls.shift_dtype.itemsize)
        return *super().sides_of(columns, *sizes), shifts

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor,
              *sides: torch.Tensor) -> Terms:
        terms = super().terms(codes, scale, scale_2)
        added = reinterpret(sides[0], cls.shift_dtype).float().repeat_interleave(cls.level_group)
        terms.minima = cls.rotate(added.view(len(codes), -1)) / -cls.group**0.5
        return terms


class W4A8_SHIFTED_FLOAT(W4A8_SHIFTED):
    """The same with numbers in float32."""

    shift_dtype = torch.float32


class W4A16(Nibbles):
    """ComfyUI's awq_w4a16: value = (code - 8) * scale + zero, both of 64 columns.

    | tensor  | dtype, shape           | meaning                             |
    |---------|------------------------|-------------------------------------|
    | packed  | uint8 (rows * K / 2,)  | codes                               |
    | scale   | uint8                  | bytes of rows * K / 64 `side_dtype` |
    | scale_2 | uint8                  | zeros, likewise                     |
    """

    group = 64
    values = W4A8_INTEGERS.values
    side_dtype = torch.bfloat16

    @classmethod
    def sides_of(cls, columns: int, *sizes: int) -> tuple[Side, ...]:
        return 2 * (Side(torch.uint8, columns // sizes[0] * cls.side_dtype.itemsize),)

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> Terms:
        scales, zeros = (reinterpret(side, cls.side_dtype).float().view(len(codes), -1, 1)
                         for side in (scale, scale_2))
        return Terms(cls.numbers(codes).view(len(codes), -1, cls.group), scales, -zeros)


class W4A16_HALF(W4A16):
    """The same with scales and zeros in float16."""

    side_dtype = torch.float16


class W4A16_FLOAT(W4A16):
    """The same with scales and zeros in float32."""

    side_dtype = torch.float32


class W6A8(RotatedLevels):
    """Levels of 6 bits, integers: eight are four bytes of low nibbles and two of upper bits."""

    bits = 6

    @classmethod
    def code_numbers(cls) -> torch.Tensor:
        """Returns the level of each code, float32 (64,)."""
        return torch.arange(-32, 32, dtype=torch.float32)

    @classmethod
    def levels(cls, codes: torch.Tensor, *sides: torch.Tensor) -> torch.Tensor:
        low, upper = codes.view(-1, 6).split([4, 2], 1)
        levels = bit_planes(low, 4).transpose(1, 2).reshape(-1, 4, 4)
        levels.add_(bit_planes(upper.reshape(-1, 4), 2).transpose(1, 2), alpha=16)
        return levels.view(torch.int8).sub_(32).float().view(len(codes), -1)


# format -> the one of its values times a number for each column
SMOOTHED = {family.base: family
            for family in (INT8_SMOOTHED, F8_SMOOTHED, NVFP4_SMOOTHED, NVFP4_LOW_SMOOTHED)}
