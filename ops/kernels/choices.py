"""What one device uses: which kernel, by what proof, and who waits how long for it."""
import functools
import logging
import textwrap
import threading
from collections.abc import Callable

import torch

from ..format import Format
from .background import Finding
from .backends import import_backend
from .check import WrongResult, check
from .identity import device_name
from .kernel import Backend, Kernel
from .proving import Prover, report_wrong
from .verdicts import Case

log = logging.getLogger(__name__)

REASON_LENGTH = 400  # of why a backend does not work, in the log
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
        backend, reasons = None, []
        for name in self.names:
            backend, reason = working_backend(name, self.device)
            if backend:
                break
            reasons.append(f"{name}: {reason}")
        if backend and self.device.type == "cuda" and torch.version.hip is None:
            self.capability = torch.cuda.get_device_capability(self.device)
        why = f", because no kernel works there ({'; '.join(reasons)})" if reasons and not backend else ""
        log.info("[Featherweight] Packed weights on %s use %s%s.", device_name(self.device),
                 backend.name if backend else "torch", why)
        return backend


class ProvenInTrials(Choice):
    """Uses of the kernels that a trial found right the fastest, and torch until it has."""

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
        backend, _ = working_backend(name, self.device)
        for kernel in backend.kernels if backend else ():
            if kernel.op == op and (kernel.min_tokens, kernel.max_tokens) == rows and kernel.accepts(*case[:2], None):
                return self._if_right(name, kernel, *case)
        return None


def working_backend(name: str, device: torch.device) -> tuple[Backend | None, str]:
    """The backend, or None and why it does not work on a device."""
    try:
        backend = import_backend(name)
        backend.probe(device)
        return backend, ""
    except WrongResult as error:
        report_wrong(f"the probe by {name}", device, error)
        return None, "its values are wrong"
    except Exception as error:  # not installed, no compiler, no driver, an unknown GPU: torch does the work then
        log.debug("[Featherweight] %s does not work on %s: %r", name, device, error)
        return None, textwrap.shorten(str(error) or repr(error), REASON_LENGTH)
