"""ComfyUI's own quantised formats, whose scales are tensors of their own.

Sources: comfy-kitchen 0.2.26 `tensor/*.py` and `backends/eager/*.py`; for MXFP8
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
`loaders/files/comfy_formats.py` brings scales into the order of the values.
"""
import math

import torch

from ..bits import select
from ..format import Side, Terms
from ._rows import RowFormat
from .bnb_int8 import INT8
from .micro_fp4 import E2M1_DOUBLED

H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


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
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        """Returns the number of each code, in any shape."""
        raise NotImplementedError

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        shape = (len(codes), -1, cls.group or cls.block_length)
        return Terms(cls.numbers(codes).view(shape), scale.view(len(codes), -1, 1))


class INT8_GROUPS(GroupScaled):
    """ComfyUI's int8_blockwise."""

    group = 128

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8)


class Float8(GroupScaled):
    """Codes are floats of a byte; they are looked up, so no device needs to know the dtype."""

    dtype: torch.dtype

    @classmethod
    def floats(cls) -> torch.Tensor:
        """Returns the value of each byte, float32 (256,)."""
        return torch.arange(256).to(torch.uint8).view(cls.dtype).float()

    @classmethod
    def numbers(cls, codes: torch.Tensor) -> torch.Tensor:
        return select(cls.constant("floats", codes.device), codes)


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


class NVFP4_ROWS(RowFormat):
    """value = float of a code * (scale_2 * scale), one scale for 16 columns: ComfyUI's nvfp4.

    | tensor  | dtype, shape           | meaning                                           |
    |---------|------------------------|---------------------------------------------------|
    | packed  | uint8 (rows * K / 2,)  | codes E2M1, two a byte, the high nibble first     |
    | scale   | uint8 (rows * K / 16,) | bytes of E4M3                                     |
    | scale_2 | float32 (rows,)        | the file's only one for each of rows              |
    """

    of_host = True
    bits = 4
    group = padding = 16
    values = tuple(value / 2 for value in E2M1_DOUBLED)

    @classmethod
    def sides_of(cls, columns: int, group: int) -> tuple[Side, ...]:
        return Side(torch.uint8, columns // group), Side(torch.float32)

    @classmethod
    def code_pairs(cls) -> torch.Tensor:
        """Returns the two float32 values of each byte, packed in int64 (256,)."""
        values = torch.tensor(cls.values, dtype=torch.float32)
        codes = torch.arange(256)
        return torch.stack([values[codes >> 4], values[codes & 15]], -1).view(torch.int64).view(-1)

    @classmethod
    def scales(cls) -> torch.Tensor:
        """Returns the value of each byte of E4M3, float32 (256,)."""
        return F8_E4M3.floats()

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor) -> Terms:
        values = select(cls.constant("code_pairs", codes.device), codes).view(torch.float32)
        scales = select(cls.constant("scales", codes.device), scale)
        scales = scales.view(len(codes), -1, 1) * scale_2.view(-1, 1, 1)
        return Terms(values.view(len(codes), -1, cls.group), scales)


class NVFP4_LOW(NVFP4_ROWS):
    """The same with the low nibble first: nvfp4 of Black Forest Labs and ModelOpt."""

    @classmethod
    def code_pairs(cls) -> torch.Tensor:
        codes = torch.arange(256)
        return super().code_pairs()[codes << 4 & 255 | codes >> 4]


class Rotated(RowFormat):
    """value = scale * (codes of a group of columns times a rotation), one scale a row.

    The rotation is symmetric, orthogonal and the Kronecker power of H4 / 2, whose elements are +-1
    over a power of two. It turns integers into sums that float32 holds exactly, so that a value is
    rounded once, whatever the order of the sum (ConvRot, https://arxiv.org/abs/2512.03673).

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
    def signs(cls) -> torch.Tensor:
        """Returns the rotation times the root of its size, float32 (group, group), of +-1."""
        power, h4 = torch.ones((1, 1), dtype=torch.float32), torch.tensor(H4, dtype=torch.float32)
        while len(power) < cls.group:
            power = torch.kron(power, h4)
        return power

    @classmethod
    def terms(cls, codes: torch.Tensor, scale: torch.Tensor) -> Terms:
        values = cls.integers(codes)
        turned = values.view(-1, cls.group) @ cls.constant("signs", codes.device)
        return Terms(turned.view(values.shape), scale.unsqueeze(-1) / cls.group**0.5)


class INT8_CONVROT(Rotated):
    """ComfyUI's int8_tensorwise with `convrot`."""

    @classmethod
    def integers(cls, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8).float()


class INT4_CONVROT(Rotated):
    """ComfyUI's convrot_w4a4: the low nibble of a byte comes first."""

    bits = 4

    @classmethod
    def code_pairs(cls) -> torch.Tensor:
        """Returns the two integers of each byte as float32, packed in int64 (256,)."""
        codes = torch.arange(256)
        pairs = torch.stack([codes & 15, codes >> 4], -1)
        return torch.where(pairs > 7, pairs - 16, pairs).float().view(torch.int64).view(-1)

    @classmethod
    def integers(cls, codes: torch.Tensor) -> torch.Tensor:
        values = select(cls.constant("code_pairs", codes.device), codes).view(torch.float32)
        return values.view(len(codes), -1)
