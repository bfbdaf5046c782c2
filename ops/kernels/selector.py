"""Per-device kernel selection: kernels checked in this process, or proven by trials before it."""
import collections
import functools
import logging
import math
import platform
import textwrap
import threading
from collections.abc import Callable

import torch
from filelock import FileLock, Timeout

from ..format import Format
from ...child_process import is_ending
from .background import Future, compute_in_background, set_result, wait
from .check import check
from .kernel import Backend, Case, Kernel, WrongResult
from .own_files import cache_folder, private_folder
from .registry import import_backend
from .trial import FREE_TO_BEGIN, free_bytes, run_trial
from .verdicts import Notes, Results, Verdicts, device_name

log = logging.getLogger(__name__)

ISSUES = "https://github.com/featherweight/ComfyUI-Featherweight/issues"
REASON_LENGTH = 400  # of why a backend does not work, in the log
EXACT = "unpack"  # the capability whose kernels have the reference's bits
# Seconds that the first call of a capability waits for a kernel that is checked in this process.
# After the first wait in vain no other is made.
WAIT_SECONDS = {EXACT: 0, "linear": 20, "int8_rows": 20, "int8_tokens": 20, "pack_blocks": 20,
                "pack_columns": 20}
MOST_USED = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "NF4", "Q3_K")  # tried before any model came


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
        self._compute_capability = None
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
        if wait(future, WAIT_SECONDS[capability] if self._waits else 0):
            return future.result()
        if capability == EXACT:
            return None
        if self._waits:
            self._waits = False
            log.warning("[Featherweight] No kernel was ready on %s after %g seconds: until ComfyUI "
                        "starts again, torch does the work of the kernels that are not ready when "
                        "they are first needed.", self.device, WAIT_SECONDS[capability])
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
        if backend and self.device.type == "cuda" and torch.version.hip is None:
            self._compute_capability = torch.cuda.get_device_capability(self.device)
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
    """Uses the fastest of the kernels that trials had proven when one was first asked for.

    What a trial finds out after that is for the next start of ComfyUI: a picture can be made again,
    bit for bit, and nobody waits. Torch works where that is faster or nothing is proven.
    """

    def __init__(self, device: torch.device, names: tuple[str, ...]):
        self.device, self.names = device, names
        self.is_pending = False  # a trial is under way
        self._reading = threading.Lock()
        self._read: tuple[list[Backend], Results] | None = None
        self._kernels: dict[tuple, list[Kernel]] = {}
        self._asked: dict[Case, None] = {}

    def find(self, capability: str, packed_format: type[Format] | None, dtype: torch.dtype,
             value_dtype: torch.dtype | None, tokens: int | None) -> Kernel | None:
        key = capability, packed_format, dtype, value_dtype
        if key not in self._kernels:
            backends, results = self._proven()
            case = case_of(*key)
            self._kernels[key] = results.kernels(case, backends)
            self.note([case])
        return next((kernel for kernel in self._kernels[key] if kernel.takes(tokens)), None)

    def backend_names(self, seconds: float) -> list[str]:
        """Of those that unpack what layers ask for. Waits for nothing."""
        backends, results = self._proven()
        used = {kernel for case in list(self._asked) if case.capability == EXACT
                for kernel in results.kernels(case, backends)[:1]}
        return [backend.name for backend in backends if used.intersection(backend.kernels)]

    def note(self, cases: list[Case]):
        """Has what no trial has met tried at the next start of ComfyUI."""
        _, results = self._proven()
        new = results.untried(case for case in cases if case not in self._asked)
        told = {case.format for case in results.untried(self._asked)}
        self._asked.update(dict.fromkeys(cases))
        if names := sorted({case.format for case in new if case.format} - told):
            log.info("[Featherweight] Kernels for %s are not proven on %s yet: torch does their "
                     "work until ComfyUI starts again.", ", ".join(names), device_name(self.device))
        if new:  # else no file is looked at between two products
            try:
                Notes().add(new)
            except OSError as error:
                log.debug("[Featherweight] What a model asks of kernels is not noted: %r", error)

    def try_kernels(self):
        """Tries what models on this machine have asked for, or what most do where none has, as far
        as that has no verdict yet. To be called in the background.
        """
        self.is_pending = True
        try:
            cases = Notes().cases() or [
                Case(capability, name, dtype, None) for name in MOST_USED
                for dtype in (torch.bfloat16, torch.float16) for capability in ("unpack", "linear")]
            verdicts = Verdicts.of_device(self.device, self.names)
            if untried := verdicts.results().untried(cases):
                with FileLock(private_folder(cache_folder() / "trials") / "lock", timeout=0):
                    self._try(verdicts, untried)
        except Timeout:
            log.info("[Featherweight] Another trial of kernels is under way; what it leaves is "
                     "tried on %s when ComfyUI starts next.", device_name(self.device))
        except Exception:  # a drive or driver may raise anything
            if not is_ending():  # when nothing is started any more
                self._log_failure()
        finally:
            self.is_pending = False

    def _try(self, verdicts: Verdicts, cases: list[Case]):
        name = device_name(self.device)
        if (free := free_bytes(self.device)) < FREE_TO_BEGIN:
            log.info("[Featherweight] Kernels are tried on %s when ComfyUI starts with %.1f GB of "
                     "it free; %.1f are.", name, FREE_TO_BEGIN / 1e9, free / 1e9)
            return
        log.info("[Featherweight] Kernels for packed weights are tried on %s in the background.",
                 name)
        before = verdicts.results().lines
        untried = run_trial(self.device, self.names, verdicts, cases)
        new = [line for kernel, line in verdicts.results().lines.items()
               if before.get(kernel) != line]
        for line in new:
            if line["verdict"] == "wrong":
                report_wrong(line["name"], self.device, line.get("why", ""))
            elif "why" in line:
                log.debug("[Featherweight] %s: %s, %s", *map(line.get, ("name", "verdict", "why")))
        words = [summary(new), *([f"{untried}, so the rest is tried when ComfyUI starts next"]
                                 if untried else []),
                 *(["used when ComfyUI starts next"] if self._read else [])]
        log.info("[Featherweight] %s: %s.", name, "; ".join(words))

    def _proven(self) -> tuple[list[Backend], Results]:
        """The backends that work here, and what was known of their kernels at the first call."""
        with self._reading:
            self._read = self._read or self._read_verdicts()
            return self._read

    def _read_verdicts(self) -> tuple[list[Backend], Results]:
        try:
            results = Verdicts.of_device(self.device, self.names).results()
            backends = [import_backend(name) for name in self.names
                        if results.verdict(f"probe by {name}") == "works"]
        except Exception:  # a drive or driver may raise anything
            self._log_failure()
            return [], Results({}, None)
        log.info("[Featherweight] Packed weights on %s use %s.", device_name(self.device),
                 " and ".join(backend.name for backend in backends) or "torch")
        return backends, results

    def _log_failure(self):
        log.warning("[Featherweight] Kernels are not tried on %s: torch does their work.",
                    self.device, exc_info=True)


def case_of(capability: str, packed_format: type[Format] | None, dtype: torch.dtype,
            value_dtype: torch.dtype | None) -> Case:
    return Case(capability, packed_format and packed_format.__name__, dtype, value_dtype)


def report_wrong(case: str, device: torch.device, error):
    """Wrong values are our fault, and only who has that device can tell us of them."""
    log.warning("[Featherweight] A kernel gives wrong values here (%s on %s, torch %s, %s: %s), so "
                "torch does its work, slower; please report this line at %s.", case,
                device_name(device), torch.__version__,
                f"{platform.system()} {platform.release()}", error, ISSUES)


def summary(lines: list[dict]) -> str:
    """What a trial has found out, in a few words."""
    counts = collections.Counter(line["verdict"] for line in lines)
    times = [line["seconds"] for line in lines
             if line["name"].startswith(EXACT) and line["verdict"] == "right"]
    proven = f"{counts['right']} kernels proven"
    words = [proven if counts["right"] else "no kernel is proven, torch does the work"]
    if times:
        speedup = math.prod(torchs / kernels for kernels, torchs in times) ** (1 / len(times))
        words.append(f"unpack {speedup:.1f} times as fast as torch")
    words += [f"{counts[verdict]} {verdict}"
              for verdict in ("slower", "wrong", "crashed", "hung", "killed") if counts[verdict]]
    lost = [line["name"] for line in lines if line["verdict"] in ("crashed", "hung")]
    report = f" ({'; '.join(lost)}: please report this line at {ISSUES})" if lost else ""
    return ", ".join(words) + report
