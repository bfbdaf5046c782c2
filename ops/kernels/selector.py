"""Selects a device's kernels: those that are proven right on it."""
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable

import torch

from ..formats._names import all_kernel_keys
from ..formats.base import Format
from ..log import log
from .background import submit, wait
from .kernel import EXACT, QUANTIZING, Backend, Case, Kernel, WrongResult, device_name
from .registry import import_backend
from .validation import report_wrong
from .validator import ProcessValidator, validate_kernel
from .verdicts import Verdicts

REASON_LENGTH = 400  # characters in the log of why a backend does not work
# How long the first call waits for a kernel that quantises. Once a wait has timed out, no later
# call waits.
WAIT_SECONDS = 20
MAX_REQUESTS = 1000  # cases that models may have validated in one run; torch does those after them
READ_SECONDS = 10  # how long a load waits for verdicts to be read
LATEST = sys.maxsize  # a load that all verdicts count for

_loads = 0  # how often a product has been proven: the number of the load that begins now
_counting = threading.Lock()


def current_load() -> int:
    """Returns the number of a load that begins now: products that are proven later are not used by
    the model that it gives."""
    return _loads


def _next_load() -> int:
    global _loads
    with _counting:
        _loads += 1
        return _loads


class Selector:
    """Uses the kernels of one backend that are proven right, as soon as they may be used.

    Those that have the reference's bits (`EXACT`) may at once, products from the next load of a
    model on. Torch does the work of the others. Nobody waits, but for kernels that quantise.

    Args:
        device: Whose kernels it selects.
        name: Of the backend; None: torch does the work.
        validator: What validates kernels in another process; None: nothing does.
        is_apart: Whether they are validated by that, and not by this process.
    """

    def __init__(self, device: torch.device, name: str | None,
                 validator: ProcessValidator | None = None, is_apart: bool = False):
        self.device = device
        self.reason = ""  # why the backend does not work
        self._name = name
        self._validator, self._is_apart = validator, is_apart
        self._backend: Backend | None = None
        self._verdicts: Verdicts | None = None
        self._lines: dict[str, dict] = {}  # by names of kernels
        self._since: dict[str, int] = {}  # the first load that a product counts for
        self._requested: set[Case] = set()
        self._found: dict[tuple, list[tuple[Kernel, int]]] = {}
        self._waits = True
        self._is_read = threading.Event()
        # the cases whose verdicts an owner waits for, and what is called then
        self._waiting: dict[object, tuple[list[tuple], Callable[[], None]]] = {}
        self._waiting_lock = threading.RLock()
        if name is None:
            self._is_read.set()
        elif device.type == "mps":  # torch must command an Apple GPU from one thread at a time
            self._read()
        else:
            submit(self._read)

    def _read(self):
        """Imports the backend and reads the verdicts on its kernels."""
        try:
            backend = import_backend(self._name or "")
            if not self._is_apart:
                backend.probe(self.device)
            self._verdicts = Verdicts.of_device(self.device, backend)
            self._lines = self._verdicts.read()
            self._backend = backend
        except WrongResult as error:
            report_wrong(f"the probe by {self._name}", self.device, error)
            self.reason = f"{self._name}: its values are wrong"
        except Exception as error:  # not installed, no compiler, no driver, an unknown GPU
            log.debug("%s does not work on %s: %r", self._name, self.device, error)
            self.reason = textwrap.shorten(f"{self._name}: {error or repr(error)}", REASON_LENGTH)
        finally:
            self._found = {}
            self._is_read.set()
            self._call_waiting()
        use = self._name
        if self.reason:
            use = f"torch, because no kernel works there ({self.reason})"
        elif self._is_apart and "right" not in self.summary():
            use = "torch until kernels are proven"
        log.info("Packed weights on %s use %s.", device_name(self.device), use)

    def find(self, capability: str, packed_format: Format | None, dtype: torch.dtype,
             tokens: int | None, load: int) -> Kernel | None:
        """Returns a kernel that is right, None where torch does the work; see `kernels.find`."""
        key = capability, packed_format, dtype
        known = self._found  # a verdict that comes meanwhile puts another in its place
        found = known[key] if key in known else self._look_up(key, known)
        return next((kernel for kernel, since in found if since <= load and kernel.takes(tokens)),
                    None)

    def _look_up(self, key: tuple, known: dict) -> list[tuple[Kernel, int]]:
        capability, packed_format, _ = key
        if capability in QUANTIZING:
            self._wait(self._is_read.is_set)
        if self._backend is None:
            return known.setdefault(key, []) if self._is_read.is_set() else []
        names = self.request(Case.of(*key), packed_format)
        if capability in QUANTIZING:
            self._wait(lambda: all(name in self._lines for name in names))
        known[key] = [(kernel, self._since.get(name, 0)) for name, kernel in names.items()
                      if self._lines.get(name, {}).get("verdict") == "right"]
        return known[key]

    def _wait(self, is_ready: Callable[[], bool]):
        """Waits for a kernel that quantises: what torch packs differs from it."""
        if self._waits and not wait(is_ready, WAIT_SECONDS):
            self._waits = False
            log.warning("No kernel was ready on %s after %g seconds: torch does "
                        "the work of those that are not ready.", self.device, WAIT_SECONDS)

    def request(self, case: Case, packed_format: Format | None) -> dict[str, Kernel]:
        """Has a case's kernels validated that have no verdict.

        Args:
            case: What is needed.
            packed_format: With the case's layout; None for a capability without formats.

        Returns:
            The kernels by the names of their verdicts.
        """
        backend = self._backend
        if backend is None:
            return {}
        names = {case.kernel_name(backend.name, kernel): kernel
                 for kernel in case.kernels(backend, packed_format)}
        is_new = case not in self._requested and len(self._requested) < MAX_REQUESTS
        if is_new and not all(name in self._lines for name in names):
            self._requested.add(case)
            if self._is_apart:
                if self._validator is not None:
                    self._validator.request(self, [case])
            elif self.device.type == "mps":
                self._validate(case, names)
            else:
                submit(lambda: self._validate(case, names))
        return names

    def _validate(self, case: Case, names: dict[str, Kernel]):
        for name, kernel in names.items():
            if name not in self._lines:
                self.add(name, **validate_kernel(kernel, case, self.device))

    def add(self, name: str, verdict: str, **more):
        """Takes a verdict on a kernel, and stores it."""
        line = {"name": name, "verdict": verdict, **more}
        if self._verdicts is not None:
            try:
                line = self._verdicts.add(name, verdict, **more)
            except OSError as error:
                log.debug("A verdict cannot be kept: %r", error)
        self.take(line)

    def take(self, line: dict):
        """Takes a line of `Verdicts` that is stored already."""
        name, verdict = line["name"], line["verdict"]
        if verdict == "begun":
            return
        case = Case.of_text(name)
        if verdict == "right" and case is not None and case.capability not in EXACT | QUANTIZING:
            self._since[name] = _next_load()
        if verdict == "wrong":
            report_wrong(name, self.device, line.get("why", ""))
        elif verdict != "right":
            log.debug("%s is off on %s: %s, %s", name, self.device, verdict,
                      line.get("why", ""))
        self._lines[name] = line
        self._found = {}
        self._call_waiting()

    def when_decided(self, cases: list[tuple], owner: object, callback: Callable[[], None]):
        """Calls a function once some cases have verdicts; see `kernels.when_decided`."""
        key = object()
        self._waiting[key] = cases, callback
        weakref.finalize(owner, self._waiting.pop, key, None).atexit = False
        self._call_waiting()

    def _call_waiting(self):
        with self._waiting_lock:
            for key, (cases, callback) in self._waiting.copy().items():
                decided = all(self.verdict(*case)[0] != "pending" for case in cases)
                if decided and self._waiting.pop(key, None):  # None: its owner was freed meanwhile
                    submit(callback)

    def start(self, dtype: torch.dtype):
        """Has the kernels of all layouts validated, and then the products that models have needed
        before an update. dtype: that the device computes in."""
        if not self._is_apart or self._validator is None:
            return
        if self.wait_until_read() and self._backend is not None:
            cases = [Case("dequantize", key, dtype) for key in all_kernel_keys()]
            self._validator.request(self, [*cases, *self._products_of_earlier_versions()])

    def wait_until_read(self) -> bool:
        """Waits until the verdicts are read, or `READ_SECONDS`. Returns whether they are."""
        return self._is_read.wait(READ_SECONDS)

    def missing(self, cases: list[Case]) -> list[Case]:
        """Returns the cases without a verdict, in order, after reading what other processes have
        stored meanwhile. Raises OSError."""
        lines = {} if self._verdicts is None else self._verdicts.read()
        for name in lines.keys() - self._lines.keys():
            self.take(lines[name])
        known = {Case.of_text(name) for name in lines}
        return [case for case in cases if case not in known]

    def _products_of_earlier_versions(self) -> list[Case]:
        """Returns what models have multiplied with before an update, each once."""
        names = [] if self._verdicts is None else self._verdicts.of_earlier_versions()
        cases = filter(None, map(Case.of_text, names))
        return list(dict.fromkeys(case for case in cases if case.capability not in EXACT))

    @property
    def path(self):
        """The file of verdicts, None where there is none."""
        return None if self._verdicts is None else self._verdicts.path

    @property
    def is_off(self) -> bool:
        """Whether no kernels are to be used."""
        return self._name is None

    @property
    def backend_name(self) -> str | None:
        """Name of the backend in use, None where torch does the work."""
        return None if self._backend is None else self._backend.name

    def verdict(self, capability: str, packed_format: Format | None,
                dtype: torch.dtype) -> tuple[str, str]:
        """Returns the verdict on a case's preferred kernel, and why it is so: ("none", "") where
        there is no kernel, ("pending", "") where none has a verdict yet."""
        case = Case.of(capability, packed_format, dtype)
        if self._backend is None:
            return ("off", self.reason) if self._is_read.is_set() else ("pending", "")
        names = [case.kernel_name(self._backend.name, kernel)
                 for kernel in case.kernels(self._backend, packed_format)]
        if not names:
            return "none", ""
        lines = [self._lines[name] for name in names if name in self._lines]
        line = next((line for line in lines if line["verdict"] == "right"),
                    lines[0] if lines else {"verdict": "pending"})
        return line["verdict"], line.get("why", "")

    def lines(self) -> dict[str, dict]:
        """Returns the lines of `Verdicts` by the names of kernels."""
        return dict(self._lines)

    def summary(self) -> dict[str, list[str]]:
        """Returns the names of kernels by their verdicts."""
        found: dict[str, list[str]] = {}
        for name, line in list(self._lines.items()):
            found.setdefault(line["verdict"], []).append(name)
        return found

