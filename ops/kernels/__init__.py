"""Faster kernels for packed weights: what a device uses.

The torch code of `ops.format` and `ops.product` runs everywhere and is the reference. A backend is the module
`ops/kernels/<name>_backend.py` with a constant `BACKEND` (see `kernel`), imported when a device of its kind first uses it.

A GPU's kernels are tried in another process first (`proving`), once for each driver, torch and version of the kernel: of those
that are right a device uses the fastest for each format and number of rows, and torch where that is faster. A CPU's are checked
in this process, for they are compiled by the machine's own compiler for its own CPU, and so are those of a backend that is
asked for by name. What is used is checked here once more in any case.

All that, compiling too, happens in threads in the background, and no lock is held meanwhile. Kernels of "unpack" have the
reference's bits: nobody waits for them, torch works until one is ready, and it is taken up at the next call. The others differ
by rounding, so which of the two works is decided when one is first asked for and stays until the process ends. That call waits
for a kernel that is to be checked here, as long as `PATIENCE` says and until the user cancels, and for no trial: what has not
been proven by then is taken up by the next process. So a picture can be made again in the same process, bit for bit, whenever
the kernels come.
"""
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterable

import torch

from ..format import Format
from .background import Finding
from .check import WrongResult, check
from .identity import device_name
from .kernel import Backend, Kernel
from .proving import ISSUES, Prover, report_wrong
from .verdicts import Case

__all__ = ["BACKENDS", "ISSUES", "VARIABLE", "Backend", "Case", "Kernel", "backend_of", "find", "prepare", "unpack_into",
           "used"]

log = logging.getLogger(__name__)

VARIABLE = "FEATHERWEIGHT_KERNELS"
# Names of backends for each kind of torch device (ROCm's are "cuda" too), the one to prefer first.
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton", "nvrtc"), "mps": ("metal",)}
CHECKED_HERE = frozenset(("cpu",))  # the kinds of devices whose kernels need no trial
SHOWN_AFTER = 5  # seconds that a node waits to tell what its model uses
EXACT = "unpack"  # the operation whose kernels have the reference's bits
# Seconds that the first call of an operation waits for its kernel. After the first wait in vain no other is made.
PATIENCE = {EXACT: 0, "linear": 20, "int8_rows": 20, "int8_tokens": 20, "pack_blocks": 20, "pack_columns": 20}


class Choice:
    """What one device uses: kernels that proved right there, or none (torch). names: of its backends."""

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device, self.names = device, names
        self._proofs: dict[tuple, Finding] = {}
        self._starting = threading.Lock()  # held for no longer than a thread takes to start
        self._waits = True

    def find(self, op: str, packed_format: type[Format] | None, dtype: torch.dtype, value_dtype: torch.dtype | None,
             tokens: int | None) -> Kernel | None:
        raise NotImplementedError

    def backend(self, seconds: float) -> str | None:
        """Name of the backend, or None: the reference. seconds: to wait for what is found out in this process."""
        raise NotImplementedError

    @property
    def is_open(self) -> bool:
        """Whether there may be a backend that is not used yet."""
        raise NotImplementedError

    def _finding(self, find_out: Callable[[], object]) -> Finding:
        # Torch's commands to an Apple GPU must come from one thread at a time, and its compiler is quick.
        return Finding(find_out, in_background=bool(self.names) and self.device.type != "mps")

    def _proof(self, key: tuple, find_out: Callable[[], Kernel | None]) -> Finding:
        if key not in self._proofs:
            with self._starting:
                if key not in self._proofs:
                    self._proofs[key] = self._finding(find_out)
        return self._proofs[key]

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

    def _if_right(self, backend: str, kernel: Kernel, packed_format, dtype, value_dtype) -> Kernel | None:
        case = f"{Case(kernel.op, packed_format and packed_format.__name__, dtype, value_dtype)} by {backend}"
        try:
            check(kernel, packed_format, dtype, value_dtype, self.device)
        except WrongResult as error:
            report_wrong(case, self.device, error)
        except Exception as error:  # a compiler or driver may raise anything, and torch does the work then
            log.debug("[Featherweight] %s is off on %s: %r", case, self.device, error)
        else:
            return kernel
        return None


class CheckedHere(Choice):
    """Uses the first backend whose probe succeeds, and of it each kernel that gives the reference's results."""

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        super().__init__(device, names)
        self.capability = None
        self._backend = self._finding(self._find_backend)

    def backend(self, seconds):
        self._backend.wait(seconds)
        return self._backend.value.name if self._backend.value else None

    @property
    def is_open(self):
        return not self._backend.decided

    def find(self, op, packed_format, dtype, value_dtype, tokens):
        backend = self._backend.value if self._is_decided(self._backend, op) else None
        for kernel in backend.kernels if backend else ():
            if kernel.op == op and kernel.takes(tokens) and kernel.accepts(packed_format, dtype, self.capability):
                case = kernel, packed_format, dtype, value_dtype
                proof = self._proof(case, functools.partial(self._if_right, backend.name, *case))
                if self._is_decided(proof, op) and proof.value:
                    return kernel
        return None

    def _find_backend(self) -> Backend | None:
        backend = next(filter(None, (_working_backend(name, self.device) for name in self.names)), None)
        if backend and self.device.type == "cuda" and torch.version.hip is None:
            self.capability = torch.cuda.get_device_capability(self.device)
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(self.device), backend.name if backend else "torch")
        return backend


class ProvenInTrials(Choice):
    """Uses of the kernels that a trial found right the fastest."""

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        super().__init__(device, names)
        self.prover = Prover(device, names)
        self._decided = {}

    def backend(self, seconds):
        return " and ".join(self.prover.best(seconds)) or None

    @property
    def is_open(self):
        return self.prover.at_work

    def find(self, op, packed_format, dtype, value_dtype, tokens):
        for proven in self._candidates(op, packed_format, dtype, value_dtype):
            if proven.is_faster(tokens):
                key = proven.backend, proven.rows, op, packed_format, dtype, value_dtype
                proof = self._proof(key, functools.partial(self._if_right_here, *key))
                if not self._is_decided(proof, op):
                    return None
                if proof.value:
                    return proof.value
        return None

    def _candidates(self, op, *case) -> tuple:
        if op == EXACT:
            return self.prover.proven(op, *case) or ()
        key = op, *case
        if key not in self._decided:
            self._decided.setdefault(key, self.prover.proven(op, *case, wait=True) or ())
        return self._decided[key]

    def _if_right_here(self, name, rows, op, *case) -> Kernel | None:
        backend = _working_backend(name, self.device)
        for kernel in backend.kernels if backend else ():
            if kernel.op == op and (kernel.min_tokens, kernel.max_tokens) == rows and kernel.accepts(*case[:2], None):
                return self._if_right(name, kernel, *case)
        return None


_choices: dict[torch.device, Choice] = {}
_choosing = threading.Lock()  # held for no longer than a thread takes to start


def _choice(device: torch.device) -> Choice:
    if device.type == "mps":
        device = torch.device("mps", 0)  # which is what its tensors lie on
    if device not in _choices:
        with _choosing:
            if device not in _choices:
                _choices[device] = _new_choice(device)
    return _choices[device]


def _new_choice(device: torch.device) -> Choice:
    """As the environment variable asks."""
    names = BACKENDS.get(device.type, ())
    asked = os.environ.get(VARIABLE, "").lower()
    known = {"torch", "auto"}.union(*BACKENDS.values())
    if asked and asked not in known:
        log.warning("[Featherweight] %s is %s; it can be %s. It counts as not set.", VARIABLE, asked, ", ".join(sorted(known)))
    if asked == "torch" or not names:
        return CheckedHere(device, ())
    if asked in names:
        return CheckedHere(device, (asked,))
    return (CheckedHere if device.type in CHECKED_HERE else ProvenInTrials)(device, names)


def _working_backend(name: str, device: torch.device) -> Backend | None:
    try:
        backend = importlib.import_module(f".{name}_backend", __package__).BACKEND
        backend.probe(device)
        return backend
    except WrongResult as error:
        report_wrong(f"the probe by {name}", device, error)
    except Exception as error:  # not installed, no compiler, no driver, an unknown GPU: torch does the work then
        log.debug("[Featherweight] %s does not work on %s: %r", name, device, error)
    return None


def find(op: str, device: torch.device, packed_format: type[Format] | None, dtype: torch.dtype,
         value_dtype: torch.dtype | None = None, tokens: int | None = None) -> Callable[..., None] | None:
    """The `run` of a kernel (see `Kernel`), or None: use the reference.

    What is not known of the device's kernels yet is found out in the background from the first call on; see `PATIENCE`.
    value_dtype is what `run` will be given. tokens: rows of the input, for "linear". packed_format: None for "int8_tokens".
    """
    kernel = _choice(device).find(op, packed_format, dtype, value_dtype, tokens)
    return None if kernel is None else kernel.run


def prepare(device: torch.device, cases: Iterable[Case], shapes: dict[str, set[tuple[int, int]]]):
    """What a model that is being loaded will ask for on a device, so that a trial can begin before the model takes its place.

    shapes: name of a format -> (N, K) of the model's weights, which the trial times.
    """
    choice = _choice(device)
    if isinstance(choice, ProvenInTrials):
        choice.prover.want(list(cases), shapes)


def backend_of(device: torch.device) -> str:
    """Name of the backend that a device uses, "torch" for none. Waits for the choice, as the first product does, but for no
    trial."""
    return _choice(device).backend(PATIENCE["linear"]) or "torch"


def used(device: torch.device) -> str:
    """What unpacks on a device, in words, as far as it is known now."""
    choice = _choice(device)
    name = choice.backend(SHOWN_AFTER)
    return name or ("torch until kernels are proven" if choice.is_open else "torch")


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
