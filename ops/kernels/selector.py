"""Per-device kernel selection: kernels checked in this process, or proven by trials before it."""
import functools
import logging
import textwrap
import threading
from collections.abc import Callable

import torch

from ..format import Format
from .background import Future, compute_in_background, set_result, wait
from .kernel import Backend, Case, Kernel, WrongResult, compute_capability, device_name
from .registry import import_backend
from .trial_startup import is_trying, log_failure
from .validation import check, report_wrong
from .verdicts import Notes, Results, Verdicts

log = logging.getLogger(__name__)

REASON_LENGTH = 400  # of why a backend does not work, in the log
EXACT = "dequantize"  # the capability whose kernels have the reference's bits
# Seconds that the first call waits for a kernel that is checked in this process, and for one with
# the reference's bits. After the first wait in vain no other is made.
WAIT_SECONDS, EXACT_WAIT_SECONDS = 20, 0


class InProcessSelector:
    """Uses the first backend that works, and its kernels that prove right in this process.

    Args:
        names: of the backends, the one to prefer first; none: torch does the work.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device, self.names = device, names
        self._checks: dict[tuple, Future] = {}
        self._starting = threading.Lock()  # held for no longer than a thread takes to start
        self._waits = True
        self._compute_capability = compute_capability(device)
        self._backend = self._compute(self._find_backend)

    def find(self, capability: str, packed_format: type[Format] | None, dtype: torch.dtype,
             value_dtype: torch.dtype | None, tokens: int | None) -> Kernel | None:
        backend = self._value(self._backend, capability)
        for kernel in backend.kernels if backend else ():
            if (kernel.capability == capability and kernel.takes(tokens)
                    and kernel.accepts(packed_format, dtype, self._compute_capability)):
                is_right = self._check(backend.name, kernel, packed_format, dtype, value_dtype)
                if self._value(is_right, capability):
                    return kernel
        return None

    def backend_names(self, seconds: float) -> list[str]:
        """Of what is used. Waits at most so long until that is known."""
        is_known = wait(self._backend, seconds)
        return [self._backend.result().name] if is_known and self._backend.result() else []

    @property
    def is_pending(self) -> bool:
        """Whether a backend may come to be used."""
        return not self._backend.done()

    def _compute(self, compute: Callable[[], object]) -> Future:
        if self.names and self.device.type != "mps":
            return compute_in_background(compute)
        # Torch's commands to an Apple GPU must come from one thread at a time, and its compiler is
        # quick.
        future = Future()
        future.set_result(compute())
        return future

    def _value(self, future: Future, capability: str):
        """What a future gives, after waiting as long as the capability may.

        Where that was in vain it gives None: for now where kernels have torch's bits, else from now
        on, so that a picture is not made by torch in one run and by a kernel in the next.
        """
        seconds = EXACT_WAIT_SECONDS if capability == EXACT else WAIT_SECONDS
        if wait(future, seconds if self._waits else 0):
            return future.result()
        if capability == EXACT:
            return None
        if self._waits:
            self._waits = False
            log.warning("[Featherweight] No kernel was ready on %s after %g seconds: until ComfyUI "
                        "starts again, torch does the work of the kernels that are not ready when "
                        "they are first needed.", self.device, seconds)
        set_result(future, None)
        return future.result()

    def _find_backend(self) -> Backend | None:
        backend, reasons = None, []
        for name in self.names:
            try:
                candidate = import_backend(name)
                candidate.probe(self.device)
                backend = candidate
                break
            except WrongResult as error:
                report_wrong(f"the probe by {name}", self.device, error)
                reasons.append(f"{name}: its values are wrong")
            except Exception as error:  # not installed, no compiler, no driver, an unknown GPU
                log.debug("[Featherweight] %s does not work on %s: %r", name, self.device, error)
                reason = textwrap.shorten(str(error) or repr(error), REASON_LENGTH)
                reasons.append(f"{name}: {reason}")
        why = f", because no kernel works there ({'; '.join(reasons)})" if reasons else ""
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(self.device),
                 backend.name if backend else f"torch{why}")
        return backend

    def _check(self, backend: str, *case) -> Future:
        if case not in self._checks:
            with self._starting:
                if case not in self._checks:
                    is_right = functools.partial(self._is_right, backend, *case)
                    self._checks[case] = self._compute(is_right)
        return self._checks[case]

    def _is_right(self, backend: str, kernel: Kernel, packed_format, dtype, value_dtype) -> bool:
        case = case_of(kernel.capability, packed_format, dtype, value_dtype)
        try:
            check(kernel, packed_format, dtype, value_dtype, self.device)
            return True
        except WrongResult as error:
            report_wrong(f"{case} by {backend}", self.device, error)
        except Exception as error:  # a compiler or driver may raise anything
            log.debug("[Featherweight] %s by %s is off on %s: %r", case, backend, self.device,
                      error)
        return False


class TrialedSelector:
    """Uses the fastest of the kernels that trials had proven when this was made.

    What a trial finds out after that is for the next start of ComfyUI: a picture can be made again,
    bit for bit, and nobody waits. Torch works where that is faster or nothing is proven.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device = device
        self._results, self._backends = Results({}, None), []
        self._kernels: dict[tuple, list[Kernel]] = {}
        self._asked: dict[Case, None] = {}
        try:
            results = Verdicts.of_device(device, names).results()
            self._backends = [import_backend(name) for name in names
                              if results.verdict(f"probe by {name}") == "works"]
            self._results = results
        except Exception:  # a drive or driver may raise anything
            log_failure(device)
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(device),
                 " and ".join(backend.name for backend in self._backends) or "torch")

    def find(self, capability: str, packed_format: type[Format] | None, dtype: torch.dtype,
             value_dtype: torch.dtype | None, tokens: int | None) -> Kernel | None:
        key = capability, packed_format, dtype, value_dtype
        if key not in self._kernels:
            case = case_of(*key)
            self._kernels[key] = self._results.kernels(case, self._backends)
            self.note([case])
        return next((kernel for kernel in self._kernels[key] if kernel.takes(tokens)), None)

    def backend_names(self, seconds: float) -> list[str]:
        """Of those that dequantise what layers ask for. Waits for nothing."""
        used = {kernel for case in list(self._asked) if case.capability == EXACT
                for kernel in self._results.kernels(case, self._backends)[:1]}
        return [backend.name for backend in self._backends if used.intersection(backend.kernels)]

    @property
    def is_pending(self) -> bool:
        """Whether a trial is under way."""
        return is_trying(self.device)

    def note(self, cases: list[Case]):
        """Has what no trial has met tried at the next start of ComfyUI."""
        new = self._results.untried(case for case in cases if case not in self._asked)
        told = {case.format for case in self._results.untried(self._asked)}
        self._asked.update(dict.fromkeys(cases))
        if names := sorted({case.format for case in new if case.format} - told):
            log.info("[Featherweight] Kernels for %s are not proven on %s yet: torch does their "
                     "work until ComfyUI starts again.", ", ".join(names), device_name(self.device))
        if new:  # else no file is looked at between two products
            try:
                Notes().add(new)
            except OSError as error:
                log.debug("[Featherweight] What a model asks of kernels is not noted: %r", error)


def case_of(capability: str, packed_format: type[Format] | None, dtype: torch.dtype,
            value_dtype: torch.dtype | None) -> Case:
    return Case(capability, packed_format and packed_format.__name__, dtype, value_dtype)
