"""Faster kernels for packed weights: what a backend says of itself, and what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is the module
`ops/kernels/<name>_backend.py` with a constant `BACKEND`; it is imported when a device of its kind is first used. A device
uses the first backend whose probe succeeds, and of it each kernel that gives the reference's results on that device.

All that, compiling too, happens in threads in the background, and no lock is held meanwhile. Kernels of "unpack" have the
reference's bits: nobody waits for them, torch works until one is ready. The others differ by rounding, so which of the two
works is decided when one is first asked for and stays: that call waits for the kernel, as long as `PATIENCE` says and until
the user cancels, and what is not ready by then is torch's work until the process ends. So a picture can be made again in the
same process, bit for bit, whenever the kernels come.
"""
import importlib
import logging
import os
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..format import Format
from .background import Finding
from .check import WrongResult, check

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
# Names of backends for each kind of torch device (ROCm's are "cuda" too), the one to prefer first.
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "nvrtc"), "mps": ("metal",)}
# The kinds of devices that use them unasked. No kernel has run on a real GPU yet, and a check can refuse wrong values, not a
# launch that ends the process.
UNASKED = {"cpu"}
EXACT = "unpack"  # the operation whose kernels have the reference's bits
# Seconds that the first call of an operation waits for its kernel. After the first wait in vain no other is made.
PATIENCE = {EXACT: 0, "linear": 20, "int8_rows": 20, "int8_tokens": 20, "pack_blocks": 20, "pack_columns": 20}
ISSUES = "https://github.com/featherweight/ComfyUI-Featherweight/issues"


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operation of a backend and what it accepts.

    op: "unpack", "linear", "int8_rows", "int8_tokens", "pack_blocks" or "pack_columns". formats: names of formats; a format
    made of one of them (another block length) counts as it; none for "int8_tokens". dtypes: of the values for "unpack" and
    where they are packed, of input and output for "linear", of the input for "int8_tokens", int8 for "int8_rows". min_tokens,
    max_tokens: rows of the input that "linear" takes, both included; None: any. capability: the least CUDA compute capability;
    ROCm and others ignore it.

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
    run, "pack_blocks": run(packed_format, values, weights, fit, tries, rounds, sweeps, emphasis), see `grid_search.Search.fit`.
        values, weights: float32 (n, block_length), contiguous; weights may be None. fit: a `Fit`, to be written. Its blocks
        may be others than the reference's, with an error that is no larger on average.
    run, "pack_columns": run(packed_format, values, shares, weights, chosen, tries, rounds), see `grid_columns.choose_columns`.
        All are contiguous. What is chosen may be other than the reference's, with a loss that is no larger on average.
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
        self.capability = None
        self._names = _candidates(device)
        self._proofs: dict[tuple, Finding] = {}
        self._starting = threading.Lock()  # held for no longer than a thread takes to start
        self._waits = True
        self._backend = self._finding(self._find_backend)

    def _finding(self, find_out: Callable[[], object]) -> Finding:
        # Torch's commands to an Apple GPU must come from one thread at a time, and its compiler is quick.
        return Finding(find_out, in_background=bool(self._names) and self.device.type != "mps")

    def backend(self, op: str) -> Backend | None:
        """The backend, or None: use the reference. op: its `PATIENCE` is how long to wait for the choice."""
        return self._backend.value if self._is_decided(self._backend, op) else None

    def find(self, op: str, packed_format: type[Format] | None, dtype: torch.dtype, value_dtype: torch.dtype | None,
             tokens: int | None) -> Kernel | None:
        backend = self.backend(op)
        for kernel in backend.kernels if backend else ():
            if kernel.op == op and kernel.takes(tokens) and kernel.accepts(packed_format, dtype, self.capability):
                proof = self._proof(backend, kernel, packed_format, dtype, value_dtype)
                if self._is_decided(proof, op) and proof.value:
                    return kernel
        return None

    def _proof(self, backend, *case) -> Finding:
        if case not in self._proofs:
            with self._starting:
                if case not in self._proofs:
                    self._proofs[case] = self._finding(lambda: self._is_right(backend, *case))
        return self._proofs[case]

    def _is_decided(self, finding: Finding, op: str) -> bool:
        """Waits as long as `op` may. After that the reference does the work: for now where both have the same bits, else from
        now on, so that a picture is not made by one in one run and by the other in the next."""
        if finding.decided or finding.wait(PATIENCE[op] if self._waits else 0):
            return True
        if op == EXACT:
            return False
        if self._waits:
            self._waits = False
            log.warning("[Featherweight] No kernel was ready on %s after %g seconds: until ComfyUI starts again, torch does the"
                        " work of the kernels that are not ready when they are first needed.", self.device, PATIENCE[op])
        finding.decide(None)
        return True

    def _find_backend(self) -> Backend | None:
        backend = next(filter(None, (_working_backend(name, self.device) for name in self._names)), None)
        if backend and self.device.type == "cuda" and torch.version.hip is None:
            self.capability = torch.cuda.get_device_capability(self.device)
        log.info("[Featherweight] Packed weights on %s use %s.", _device_name(self.device),
                 backend.name if backend else "torch")
        return backend

    def _is_right(self, backend, kernel, packed_format, dtype, value_dtype) -> bool:
        name = packed_format.__name__ if packed_format else "any format"
        rounded = f" by way of {value_dtype}" if value_dtype else ""
        case = f"{kernel.op} of {name} to {dtype}{rounded} by {backend.name}"
        try:
            check(kernel, packed_format, dtype, value_dtype, self.device)
        except WrongResult as error:
            _report(case, self.device, error)
        except Exception as error:  # a compiler or driver may raise anything, and torch does the work then
            log.debug("[Featherweight] %s is off on %s: %r", case, self.device, error)
        else:
            return True
        return False


_choices: dict[torch.device, Choice] = {}
_choosing = threading.Lock()  # held for no longer than a thread takes to start


def _candidates(device: torch.device) -> tuple[str, ...]:
    """Names of the backends to try on a device, in order."""
    names = BACKENDS.get(device.type, ())
    asked = os.environ.get(VARIABLE, "").lower()
    known = {"torch", "auto"}.union(*BACKENDS.values())
    if asked and asked not in known:
        log.warning("[Featherweight] %s is %s; it can be %s. It counts as not set.", VARIABLE, asked, ", ".join(sorted(known)))
    if asked == "torch" or asked != "auto" and asked not in names and device.type not in UNASKED:
        return ()
    return (asked,) if asked in names else names


def _working_backend(name: str, device: torch.device) -> Backend | None:
    try:
        backend = importlib.import_module(f".{name}_backend", __package__).BACKEND
        backend.probe(device)
        return backend
    except WrongResult as error:
        _report(f"the probe by {name}", device, error)
    except Exception as error:  # not installed, no compiler, no driver, an unknown GPU: torch does the work then
        log.debug("[Featherweight] %s does not work on %s: %r", name, device, error)
    return None


def _report(case: str, device: torch.device, error: Exception):
    """Wrong values are our fault, and only who has that device can tell us of them."""
    log.warning("[Featherweight] A kernel gives wrong values here (%s on %s, torch %s, %s: %s), so torch does its work, slower;"
                " please report this line at %s.", case, _device_name(device), torch.__version__, platform.platform(), error,
                ISSUES)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def find(op: str, device: torch.device, packed_format: type[Format] | None, dtype: torch.dtype,
         value_dtype: torch.dtype | None = None, tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    The first call for a device has its backends probed, the first for a format and its dtypes the kernels checked, both in the
    background; see `PATIENCE`. value_dtype is what `run` will be given. tokens: rows of the input, for "linear". packed_format:
    None for "int8_tokens".
    """
    kernel = _choice(device).find(op, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def backend_of(device: torch.device) -> str:
    """Name of the backend that a device uses, "torch" for none. Waits for the choice, as the first product does."""
    backend = _choice(device).backend("linear")
    return backend.name if backend else "torch"


def _choice(device: torch.device) -> Choice:
    if device not in _choices:
        with _choosing:
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
