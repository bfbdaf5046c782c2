"""What a backend says of itself, and what a layer asks of it."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..format import Format

FORMAT = re.compile(r"\w{1,40}")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class WrongResult(ArithmeticError):
    """A kernel ran and gave something else than the reference. The message says in which case, and
    how far off."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One implementation of a capability, and its constraints.

    capability: "dequantize", "linear", "int8_rows", "int8_tokens", "pack_blocks" or "pack_columns".
    The constraints are formats, names of formats; a format made of one of them (another block
    length) counts as it; none for "int8_tokens". dtypes: of the values for "dequantize" and where
    they are packed, of input and output for "linear", of the input for "int8_tokens", int8 for
    "int8_rows". min_tokens, max_tokens: rows of the input that "linear" takes, both included; None:
    any.
    min_compute_capability: of CUDA; ROCm and others ignore it.

    run, "dequantize": run(packed_format, tensors, out, value_dtype, first), see
        `Format.dequantize_into`: float32 arithmetic in the reference's order, without fused
        multiply-add, so that the values have the reference's bits. run, "linear":
        run(packed_format, tensors, input, addend, out, value_dtype). out = input @ weight.T +
        addend, summed in float32 and rounded once. input: (M, K), contiguous, K a multiple of the
        block length. addend: (M, N) of any strides, or None. out: (M, N), contiguous. The weight's
        values are rounded to value_dtype where one is given, and may then be rounded to the input's
        dtype, as the reference does.
    run, "int8_rows": run(packed_format, tensors, codes, scales, value_dtype, first), see
        `int8_codes.encode_rows`; K is a multiple of 256 and of the block length.
    run, "int8_tokens": run(input, codes, scales), see `int8_codes.encode_tokens`. Codes of both may
        differ from the reference's by one where a value lies within 0.01 of the middle between two,
        scales by 1e-5 of themselves. run, "pack_blocks": run(packed_format, values, weights, fit,
        tries, rounds, sweeps, emphasis), see `grid_search.Search.fit`.
        values, weights: float32 (n, block_length), contiguous; weights may be None. fit: a `Fit`,
        to be written. Its blocks may be others than the reference's, with an error that is no
        larger on average.
    run, "pack_columns": run(packed_format, values, shares, weights, chosen, tries, rounds), see
        `grid_columns.choose_columns`. All are contiguous. What is chosen may be other than the
        reference's, with a loss that is no larger on average.
    """
    capability: str
    formats: frozenset[str]
    dtypes: frozenset[torch.dtype]
    run: Callable[..., None]
    min_tokens: int = 1
    max_tokens: int | None = None
    min_compute_capability: tuple[int, int] = (0, 0)

    def accepts(self, packed_format: type[Format] | None, dtype: torch.dtype,
                capability: tuple[int, int] | None) -> bool:
        """Whether its constraints let it run at all.

        Args:
            capability: see `compute_capability`.
        """
        return (
            dtype in self.dtypes
            and (capability is None or capability >= self.min_compute_capability)
            and (
                packed_format is None
                or any(base.__name__ in self.formats for base in packed_format.__mro__)
            )
        )

    def takes(self, tokens: int | None) -> bool:
        return (
            tokens is None
            or (self.min_tokens <= tokens
            and (self.max_tokens is None or tokens <= self.max_tokens))
        )


@dataclass(frozen=True)
class Backend:
    """probe(device): one tiny launch, and an exception that says why where the backend cannot
    work."""
    name: str
    probe: Callable[[torch.device], None]
    kernels: tuple[Kernel, ...]


class Case(NamedTuple):
    """What a layer asks for. format: a name, None for "int8_tokens". The rest as in `Kernel`."""
    capability: str
    format: str | None
    dtype: torch.dtype
    value_dtype: torch.dtype | None

    def __str__(self) -> str:
        return (f"{self.capability} of {self.format or 'any format'} to {dtype_name(self.dtype)}"
                + (f" by way of {dtype_name(self.value_dtype)}" if self.value_dtype else ""))

    @property
    def rounded_dtype(self) -> torch.dtype | None:
        """As `kernels.dequantize_into` hands `value_dtype` on."""
        return None if self.value_dtype == self.dtype else self.value_dtype

    def kernel_name(self, backend: str, kernel: Kernel) -> str:
        """What the verdict on a kernel for this case is kept under."""
        return f"{self}, rows {kernel.min_tokens} to {kernel.max_tokens or 'any'} by {backend}"

    def as_json(self) -> list:
        return [
            self.capability, self.format,
            dtype_name(self.dtype), self.value_dtype and dtype_name(self.value_dtype)
        ]

    @classmethod
    def of_json(cls, parts: Any) -> "Case | None":
        """The case that `as_json` gave, None for anything else."""
        dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
        match parts:
            case ["int8_tokens", None, str(dtype), None] if dtype in dtypes:
                return cls("int8_tokens", None, dtypes[dtype], None)
            case [
                "dequantize" | "linear" | "int8_rows" as capability,
                str(name),
                str(dtype),
                str() | None as value_dtype
            ]:
                if FORMAT.fullmatch(name) and dtype in dtypes and value_dtype in (None, *dtypes):
                    return cls(capability, name, dtypes[dtype], dtypes.get(value_dtype))
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's of a device, None where there is no such thing."""
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_cuda else None


def device_name(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{name}"
