"""Faster kernels for packed weights: what a backend says of itself, and what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is the module
`ops/kernels/<name>_backend.py` with a constant `BACKEND`; it is imported when a device of its kind is first used. A device
uses the first backend whose probe succeeds, and of it each kernel that gives the reference's results on that device.
"""
import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..format import Format
from .check import check

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
# Names of backends for each kind of torch device (ROCm's are "cuda" too), the one to prefer first.
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "nvrtc"), "mps": ("metal",)}
# The kinds of devices that use them unasked. No kernel has run on a real GPU yet, and a check can refuse wrong values, not a
# launch that ends the process.
UNASKED = {"cpu"}


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operation of a backend and what it accepts.

    op: "unpack", "linear", "int8_rows" or "int8_tokens". formats: names of formats; a format made of one of them (another block
    length) counts as it; none for "int8_tokens". dtypes: of the values for "unpack", of input and output for "linear", of the
    input for "int8_tokens", int8 for "int8_rows". min_tokens, max_tokens: rows of the input that "linear" takes, both included;
    None: any. capability: the least CUDA compute capability; ROCm and others ignore it.

    run, "unpack": run(packed_format, tensors, out, value_dtype, first), see `Format.unpack_into`: float32 arithmetic in the
        reference's order, without fused multiply-add, so that the values have the reference's bits.
    run, "linear": run(packed_format, tensors, input, addend, out, value_dtype). out = input @ weight.T + addend, summed in
        float32 and rounded once. input: (M, K), contiguous, K a multiple of the block length. addend: (M, N) of any strides,
        or None. out: (M, N), contiguous. The weight's values are rounded to value_dtype where one is given, and may
        then be rounded to the input's dtype, as the reference does.
    run, "int8_rows": run(packed_format, tensors, codes, scales, value_dtype, first), see `int8_codes.encode_rows`; K is a
        multiple of 256 and of the block length.
    run, "int8_tokens": run(input, codes, scales), see `int8_codes.encode_tokens`. Codes of both may differ from the
        reference's by one where a value lies within 0.01 of the middle between two, scales by 1e-5 of themselves.
    """
    op: str
    formats: frozenset[str]
    dtypes: frozenset[torch.dtype]
    run: Callable[..., None]
    min_tokens: int = 1
    max_tokens: int | None = None
    capability: tuple[int, int] = (0, 0)

    def accepts(self, packed_format: type[Format] | None, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
        """Whether it can run at all; capability: the device's, None where there is no such thing."""
        return (dtype in self.dtypes and (capability is None or capability >= self.capability)
                and (packed_format is None or any(base.__name__ in self.formats for base in packed_format.__mro__)))

    def takes(self, tokens: int | None) -> bool:
        return tokens is None or self.min_tokens <= tokens and (self.max_tokens is None or tokens <= self.max_tokens)


@dataclass(frozen=True)
class Backend:
    """probe(device): one tiny launch, and an exception that says why where the backend cannot work."""
    name: str
    probe: Callable[[torch.device], None]
    kernels: tuple[Kernel, ...]


class Choice:
    """What one device uses: a backend or none (torch), and the kernels that proved right there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.backend = _first_working(device)
        on_cuda = device.type == "cuda" and torch.version.hip is None
        self.capability = torch.cuda.get_device_capability(device) if on_cuda else None
        self._right: dict[tuple, bool] = {}
        name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
        log.info("Featherweight: packed weights on %s use %s.", name, self.backend.name if self.backend else "torch")

    def find(self, op: str, packed_format: type[Format] | None, dtype: torch.dtype, value_dtype: torch.dtype | None,
             tokens: int | None) -> Kernel | None:
        for kernel in self.backend.kernels if self.backend else ():
            if kernel.op == op and kernel.takes(tokens):
                key = kernel, packed_format, dtype, value_dtype
                if key not in self._right:
                    with _lock:
                        self._right[key] = kernel.accepts(packed_format, dtype, self.capability) and self._is_right(*key)
                if self._right[key]:
                    return kernel
        return None

    def _is_right(self, kernel, packed_format, dtype, value_dtype) -> bool:
        try:
            check(kernel, packed_format, dtype, value_dtype, self.device)
        except Exception as error:  # a compiler or driver may raise anything, and torch does the work then
            name = packed_format.__name__ if packed_format else "any format"
            log.debug("Featherweight: %s of %s to %s by %s is off on %s: %s", kernel.op, name, dtype, self.backend.name,
                      self.device, error)
            return False
        return True


_choices: dict[torch.device, Choice] = {}
_lock = threading.RLock()


def _first_working(device: torch.device) -> Backend | None:
    names = BACKENDS.get(device.type, ())
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        names = (*names, "triton")
    asked = os.environ.get(VARIABLE, "").lower()
    known = {"torch", "auto"}.union(*BACKENDS.values())
    if asked and asked not in known:
        log.warning("Featherweight: %s is %s; it can be %s. It counts as not set.", VARIABLE, asked, ", ".join(sorted(known)))
    if asked == "torch" or asked != "auto" and asked not in names and device.type not in UNASKED:
        return None
    for name in (asked,) if asked in names else names:
        try:
            backend = importlib.import_module(f".{name}_backend", __package__).BACKEND
            backend.probe(device)
            return backend
        except Exception as error:  # not installed, no compiler, no driver, an unknown GPU: torch does the work then
            log.debug("Featherweight: %s does not work on %s: %r", name, device, error)
    return None


def find(op: str, device: torch.device, packed_format: type[Format] | None, dtype: torch.dtype,
         value_dtype: torch.dtype | None = None, tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    The first call for a device probes its backends; the first for a format and its dtypes checks the kernels. value_dtype
    is what `run` will be given. tokens: rows of the input, for "linear". packed_format: None for "int8_tokens".
    """
    kernel = _choice(device).find(op, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def backend_of(device: torch.device) -> str:
    """Name of the backend that a device uses, "torch" for none."""
    backend = _choice(device).backend
    return backend.name if backend else "torch"


def _choice(device: torch.device) -> Choice:
    if device not in _choices:
        with _lock:
            if device not in _choices:
                _choices[device] = Choice(device)
    return _choices[device]


def unpack_into(packed_format: type[Format], tensors: list[torch.Tensor], out: torch.Tensor,
                value_dtype: torch.dtype | None = None, first: int = 0) -> torch.Tensor:
    """`Format.unpack_into` by the fastest means of `out`'s device."""
    if value_dtype == out.dtype:
        value_dtype = None
    run = find("unpack", out.device, packed_format, out.dtype, value_dtype)
    if run is None:
        return packed_format.unpack_into(tensors, out, value_dtype, first)
    run(packed_format, tensors, out, value_dtype, first)
    return out
