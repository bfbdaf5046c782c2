"""What a backend offers (`Backend`, `Kernel`) and what a layer needs (`Case`)."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..formats.base import Format
from ..formats.row_layout import RowFormat
from ..stable_names import short_error_name

ANY = "any format"
PLAIN_LENGTH = 32  # values of a plain format that count as a block
PITCHED_MULTIPLE = 8  # columns of rows that "dequantize" writes with a pitch
# capabilities whose kernels have the reference's bits, and those that quantise
EXACT = {"dequantize", "channels_last", "add_rounded"}
QUANTIZING = {"pack_blocks", "pack_columns", "pack_rows", "pack_row_columns"}
# what a layer needs: capability, format (None for a capability without formats), dtype
Need = tuple[str, Format | None, torch.dtype]


@short_error_name
class SourceError(RuntimeError):
    """A compiler found a fault in a kernel's source. The message is the compiler's."""


@short_error_name
class CompilerError(RuntimeError):
    """A kernel was not compiled for another reason than its source. The message says which."""


def compiler_error(file: str, output: str) -> type[SourceError | CompilerError]:
    """Returns which error a compiler's failure is: a fault of the source only where its output
    names a line of `file`. One without memory or space on the drive fails too."""
    line = rf"(?m)(^|[/\\]){re.escape(file)}(:\d+:\d+|\(\d+\)): error\b"
    return SourceError if re.search(line, output) else CompilerError


@short_error_name
class WrongResult(ArithmeticError):
    """A kernel's result differs from the reference. The message says in which case and by how
    much."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One implementation of a capability, and its constraints.

    Attributes:
        capability: "dequantize", "channels_last", "add_rounded", "linear", "attention",
            "int8_rows", "int8_tokens", or one of `QUANTIZING`.
        formats: Names of formats. A format derived from one of them (another block length) counts
            as it. Empty for "channels_last", "add_rounded", "attention" and "int8_tokens".
        dtypes: Of the values for "dequantize" and `QUANTIZING`, of input and output for
            "linear", of the output for "channels_last", of both operands for "add_rounded",
            where it is one of 16 bits, of all but the mask for
            "attention", of the input for "int8_tokens"; int8 for "int8_rows".
        run: The function, with the arguments below.
        min_tokens: The fewest rows of the input that "linear" takes.
        max_tokens: The most rows of the input that "linear" takes; None: any number.
        takes_pitch: Whether `out` of "dequantize" may be rows with a pitch.
        is_untried: Whether no device has run it yet: used only where the user asks for such.

    The arguments of `run`, by capability:

    "dequantize": run(packed_format, tensors, out, first), see
        `Format.dequantize_into`: float32 arithmetic in the reference's order, without fused
        multiply-add, so that the values have the reference's bits. Where `takes_pitch`, `out` may
        be (rows, columns) of the strides (more than columns, 1), columns a multiple of
        `PITCHED_MULTIPLE`, and of a format of rows those of a block.
    "channels_last": run(values, out). Casts the weight of a convolution and writes it transposed.
        values: (rows, channels, taps) of any float dtype, contiguous. out: (rows, taps, channels)
        of another dtype or the same, contiguous. The values have the bits of `Tensor.to`.
    "add_rounded": run(value, change). Adds `change` to `value`, both contiguous and of one shape;
        the sum has the bits of `stochastic_rounding.stochastic_round`.
    "linear": run(packed_format, tensors, input, addend, out). Computes
        out = input @ weight.T + addend, summed in float32 and rounded once. input: (M, K),
        contiguous, K as `multiplies` says. addend: (M, N) of any strides, or None. out:
        (M, N), contiguous. The weight's values may be rounded to the input's dtype, as the
        reference does.
    "attention": run(query, key, value, mask, scale, out). Computes
        out = softmax(scale * query @ key.T + mask) @ value, summed in float32 and rounded once; the
        shares may be rounded to the dtype. query: (batch, heads, N, width). key:
        (batch, key heads, M, width). value: (batch, key heads, M, value width). Each key head
        serves heads / key heads neighbouring ones. mask: float32 (batch, heads, N, M), or None; a
        query without an unmasked key gets zeros. out: (batch, heads, N, value width). All have any
        strides, but the last is 1 of all but the mask. scale: not negative.
    "int8_rows": run(packed_format, tensors, codes, scales, first), see
        `int8_codes.encode_rows`; K is a multiple of 256, and as `multiplies` says, the address of
        codes one of 16.
    "int8_tokens": run(input, codes, scales), see `int8_codes.encode_tokens`. Codes of both may
        differ from the reference's by one where a value lies within 0.01 of the middle between two
        codes, and scales by a factor of 1e-5.
    "pack_blocks": run(packed_format, values, weights, fit, tries, rounds, sweeps, emphasis), see
        `grid_search.Search.fit`. values, weights: float32 (n, block_length), contiguous; weights
        may be None. fit: a `Fit` that the kernel fills. Its blocks may differ from the
        reference's, with an error that is no larger on average.
    "pack_columns": run(packed_format, values, shares, weights, chosen, tries, rounds), see
        `grid_error_feedback.choose_columns`. All are contiguous. The choices may differ from the
        reference's, with a loss that is no larger on average.
    "pack_rows": run(encoder, values, out), see `row_encoder.RowEncoder.encode`. values: contiguous.
        The scales are the reference's, but where two are about equally good, and for the same
        scales the bytes are.
    "pack_row_columns": run(encoder, rows, encoded, span, damped), see `row_columns.choose_codes`.
        The choices may differ as those of "pack_columns" do.
    """
    capability: str
    formats: frozenset[str]
    dtypes: frozenset[torch.dtype]
    run: Callable[..., None]
    min_tokens: int = 1
    max_tokens: int | None = None
    takes_pitch: bool = False
    is_untried: bool = False

    def accepts(self, packed_format: Format | None, dtype: torch.dtype) -> bool:
        """Returns whether the constraints on format and dtype are met.

        Args:
            packed_format: Of the weight; None for a capability without formats.
            dtype: One of `dtypes`.
        """
        return (
            dtype in self.dtypes
            and (
                packed_format is None
                or not self.formats.isdisjoint(packed_format.kernel_names())
            )
        )

    def takes(self, tokens: int) -> bool:
        """Returns whether it takes an input of so many rows."""
        return self.min_tokens <= tokens and (self.max_tokens is None or tokens <= self.max_tokens)


@dataclass(frozen=True)
class Backend:
    """A group of kernels that work under the same conditions.

    Attributes:
        name: As in `registry`.
        probe: Launches one tiny kernel on a device; raises where the backend cannot work there.
        kernels: Of every capability it has; of two for the same case the preferred one first.
        open: Loads the compiler and the driver, and launches nothing; raises where there is none.
        compiler: Returns a text that differs where what compiles the kernels does.
        platform: The folder of `source/` that its kernels are made from.
        files: Those that compile and launch them.
    """
    name: str
    probe: Callable[[torch.device], None]
    kernels: tuple[Kernel, ...]
    open: Callable[[], object] = str
    compiler: Callable[[], str] = str
    platform: str = ""
    files: tuple[Path, ...] = ()


class Case(NamedTuple):
    """What a layer needs: a capability for one layout and dtype.

    Attributes:
        capability: As in `Kernel`.
        layout: A format's `kernel_key`, None for a capability without formats.
        dtype: As in `Kernel`.
    """
    capability: str
    layout: str | None
    dtype: torch.dtype

    @classmethod
    def of(cls, capability: str, packed_format: Format | None, dtype: torch.dtype) -> "Case":
        """Returns the case of a capability for a format."""
        return cls(capability, packed_format and packed_format.kernel_key, dtype)

    def __str__(self) -> str:
        return f"{self.capability} of {self.layout or ANY} to {dtype_name(self.dtype)}"

    def kernel_name(self, backend: str, kernel: Kernel) -> str:
        """Returns the name under which the verdict on a kernel for this case is stored."""
        return f"{self}, rows {kernel.min_tokens} to {kernel.max_tokens or 'any'} by {backend}"

    def kernels(self, backend: Backend, packed_format: Format | None) -> list[Kernel]:
        """Returns a backend's kernels for the case.

        Args:
            backend: That has them.
            packed_format: With the case's layout; None for a capability without formats.
        """
        return [kernel for kernel in backend.kernels if kernel.capability == self.capability
                and kernel.accepts(packed_format, self.dtype)]


def block_length(packed_format: Format) -> int:
    """Returns how many values kernels take as a block of a format."""
    return packed_format.block_length if packed_format.plain_dtype is None else PLAIN_LENGTH


def multiplies(packed_format: Format, columns: int) -> bool:
    """Returns whether kernels of products take rows of so many columns."""
    if isinstance(packed_format, RowFormat) and columns != packed_format.block_length:
        return False  # two rows of codes, with scales of their own, as one row of the weight
    length = packed_format.block_length if packed_format.plain_dtype is None else PLAIN_LENGTH
    return columns % 8 == 0 and columns % length == 0


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Returns the device and a GPU's name, as the log shows them."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"
