"""Selects a device's kernels: those that validate in this process, or that trials have proven."""
import functools
import logging
import textwrap
import threading
from collections.abc import Callable

import torch

from ..formats.base import Format
from .background import Future, compute_in_background, set_result, wait
from .kernel import Backend, Case, Kernel, WrongResult, device_name
from .registry import import_backend
from .trial_startup import is_on_trial, log_failure
from .validation import check, report_wrong
from .verdicts import Notes, Results, Verdicts

log = logging.getLogger(__name__)

REASON_LENGTH = 400  # characters in the log of why a backend does not work
BIT_EXACT = {"dequantize", "channels_last"}  # the kernels that have the reference's bits
# How long the first call waits for a kernel that is checked in this process, and for one with the
# reference's bits. Once a wait has timed out, no later call waits.
WAIT_SECONDS = 20
EXACT_WAIT_SECONDS = 0


class InProcessSelector:
    """Uses the first backend that works, and those of its kernels that validate in this process.

    Args:
        device: Whose kernels it selects.
        names: Of the backends, the preferred one first; none: torch does the work.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device = device
        self.names = names
        self._checks: dict[tuple, Future] = {}
        self._starting = threading.Lock()  # held for no longer than a thread takes to start
        self._waits = True
        self._backend = self._compute(self._find_backend)

    def find(self, capability: str, packed_format: Format | None, dtype: torch.dtype,
             tokens: int | None) -> Kernel | None:
        """Returns a kernel that is right, None where torch does the work; see `kernels.find`."""
        backend = self._value(self._backend, capability)
        if backend is None:
            return None
        for kernel in backend.kernels:
            if (kernel.capability == capability and kernel.takes(tokens)
                    and kernel.accepts(packed_format, dtype)):
                is_right = self._check(backend.name, kernel, packed_format, dtype)
                if self._value(is_right, capability):
                    return kernel
        return None

    def backend_names(self, seconds: float) -> list[str]:
        """Returns the name of the backend in use, if that is known within so many seconds."""
        backend = self._backend.result() if wait(self._backend, seconds) else None
        return [] if backend is None else [backend.name]

    @property
    def is_pending(self) -> bool:
        """Whether the choice of a backend is still open."""
        return not self._backend.done()

    def _compute(self, compute: Callable[[], object]) -> Future:
        if self.names and self.device.type != "mps":
            return compute_in_background(compute)
        # Torch must command an Apple GPU from one thread at a time, and its compiler is fast.
        future = Future()
        future.set_result(compute())
        return future

    def _value(self, future: Future, capability: str):
        """Returns a future's result, waiting for it as long as the capability allows.

        When the time is up, the result is None: only this time for kernels with torch's bits, for
        good for the others, so that no picture is made by torch in one run and by a kernel in the
        next.
        """
        seconds = EXACT_WAIT_SECONDS if capability in BIT_EXACT else WAIT_SECONDS
        if wait(future, seconds if self._waits else 0):
            return future.result()
        if capability in BIT_EXACT:
            return None
        if self._waits:
            self._waits = False
            log.warning("[Featherweight] No kernel was ready on %s after %g seconds: until ComfyUI "
                        "starts again, torch does the work of the kernels that are not ready when "
                        "they are first needed.", self.device, seconds)
        set_result(future, None)
        return future.result()

    def _find_backend(self) -> Backend | None:
        """Returns the first backend that works, and logs which one, or why none does."""
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
        explanation = f", because no kernel works there ({'; '.join(reasons)})" if reasons else ""
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(self.device),
                 backend.name if backend else f"torch{explanation}")
        return backend

    def _check(self, backend: str, *case) -> Future:
        if case not in self._checks:
            with self._starting:
                if case not in self._checks:
                    is_right = functools.partial(self._is_right, backend, *case)
                    self._checks[case] = self._compute(is_right)
        return self._checks[case]

    def _is_right(self, backend: str, kernel: Kernel, packed_format, dtype) -> bool:
        case = case_of(kernel.capability, packed_format, dtype)
        try:
            check(kernel, packed_format, dtype, self.device)
            return True
        except WrongResult as error:
            report_wrong(f"{case} by {backend}", self.device, error)
        except Exception as error:  # a compiler or driver may raise anything
            log.debug("[Featherweight] %s by %s is off on %s: %r", case, backend, self.device,
                      error)
        return False


class TrialedSelector:
    """Uses the fastest of the kernels that trials had proven when it was created.

    Later results count from ComfyUI's next start: so pictures are reproducible bit for bit, and
    nobody waits. Torch does the work where it is faster or nothing is proven.

    Args:
        device: Whose kernels it selects.
        names: Of the backends to use.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device = device
        self._results = Results({}, None)
        self._backends: list[Backend] = []
        self._kernels: dict[tuple, list[Kernel]] = {}
        self._requested: dict[Case, None] = {}
        try:
            results = Verdicts.of_device(device, names).results()
            self._backends = [import_backend(name) for name in names
                              if results.verdict(f"probe by {name}") == "works"]
            self._results = results
        except Exception:  # a drive or driver may raise anything
            log_failure(device)
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(device),
                 " and ".join(backend.name for backend in self._backends) or "torch")

    def find(self, capability: str, packed_format: Format | None, dtype: torch.dtype,
             tokens: int | None) -> Kernel | None:
        """Returns the fastest proven kernel, None where torch does the work; see `kernels.find`."""
        key = capability, packed_format, dtype
        if key not in self._kernels:
            case = case_of(*key)
            self._kernels[key] = self._results.kernels(case, self._backends)
            self.note([case])
        return next((kernel for kernel in self._kernels[key] if kernel.takes(tokens)), None)

    def backend_names(self, seconds: float) -> list[str]:
        """Returns the names of the backends that dequantise what layers request. Never waits."""
        used = {kernel for case in list(self._requested) if case.capability in BIT_EXACT
                for kernel in self._results.kernels(case, self._backends)[:1]}
        return [backend.name for backend in self._backends if used.intersection(backend.kernels)]

    @property
    def is_pending(self) -> bool:
        """Whether a trial is under way."""
        return is_on_trial(self.device)

    def note(self, cases: list[Case]):
        """Has the cases that no trial has tried yet tried at ComfyUI's next start."""
        cases = [case for case in cases if Case.of_json(case.as_json())]
        new = self._results.untried(case for case in cases if case not in self._requested)
        known_formats = {case.format for case in self._results.untried(self._requested)}
        self._requested.update(dict.fromkeys(cases))
        if names := sorted({case.format for case in new if case.format} - known_formats):
            log.info("[Featherweight] Kernels for %s are not proven on %s yet: torch does their "
                     "work until ComfyUI starts again.", ", ".join(names), device_name(self.device))
        if new:  # a product with known cases reads no file
            try:
                Notes().add(new)
            except OSError as error:
                log.debug("[Featherweight] The kernels that a model needs cannot be noted: %r",
                          error)


def case_of(capability: str, packed_format: Format | None, dtype: torch.dtype) -> Case:
    """Returns the case of a capability for a format; see `Case`."""
    return Case(capability, packed_format and packed_format.name, dtype)
