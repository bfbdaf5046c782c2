"""Decides which kernels a device uses: those that are proven right on it."""
import contextlib
import textwrap
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from ..formats.base import Format
from ..log import log
from . import quantize_validation, validation
from .checker import FREE_TO_BEGIN, Kernels, ProcessChecker, check_here, ready_here
from .kernel import EXACT, QUANTIZING, Backend, Case, Kernel, Need, WrongResult, device_name
from .kernel_source import made_of
from .private_files import cache_folder, private_folder
from .registry import import_backend
from .validation import ISSUES, report_wrong
from .verdicts import Verdicts, digest_of
from .waiting import host, wait

REASON_LENGTH = 400  # characters in the log of why a backend does not work
LOCK_SECONDS = 120  # that another process may take for its kernels
MAX_CASES = 1000  # that models may have decided in one run; torch does those after them
MAX_NEW_CASES = 200  # of one load


class Decision(NamedTuple):
    """What does the work of a case.

    Attributes:
        kernels: That are right, the preferred one first.
        verdict: On the preferred one: one of `VERDICTS`, "hung" or "failed"; "none" where there is
            no kernel, "off" where none works, "open" where nothing could be found out.
        why: Why it is so.
    """
    kernels: tuple[Kernel, ...]
    verdict: str
    why: str = ""


class Decider:
    """Decides the cases of one device, each once.

    Args:
        device: That the kernels run on.
        name: Of the backend; None: torch does all work.
        checker: Checks kernels in another process; None: this process does.
        takes_untried: Whether it takes kernels that no device has run, see `Kernel`.
    """

    def __init__(self, device: torch.device, name: str | None,
                 checker: ProcessChecker | None = None, takes_untried: bool = False):
        self.device = device
        self._takes_untried = takes_untried
        self.reason = ""  # why the backend does not work
        self.is_off = name is None
        self._name, self._checker = name, checker
        self._backend: Backend | None = None
        self._verdicts: Verdicts | None = None
        self._lines: dict[str, dict] = {}  # by the names of kernels
        self._decisions: dict[Case, Decision] = {}
        self._lock = threading.RLock()

    def find(self, case: Case) -> Decision | None:
        """Returns what was decided of a case, None where nothing was."""
        if self.is_off or self.reason:
            return Decision((), "off", self.reason)
        return self._decisions.get(case)

    def _is_decided(self, case: Case) -> bool:
        decision = self.find(case)
        if decision is None:
            return False
        # what has the reference's bits may change later, a product may not
        return decision.verdict != "open" or case.capability not in EXACT | QUANTIZING

    def meet(self, case: Case):
        """Takes a case that a step needs and no load has decided: a product stays torch's."""
        self._decisions.setdefault(case, Decision((), "open", "a step needed it first"))

    def decide(self, needed: Iterable[Need], makes_room: bool) -> bool:
        """Decides cases that are not decided, and waits for that.

        Args:
            needed: Capability, format and dtype of each case.
            makes_room: See `kernels.decide`.

        Returns:
            Whether there was one.

        Raises:
            Exception: What `host.raise_if_cancelled` raises.
        """
        formats = {Case.of(*each): each[1] for each in needed}
        if all(map(self._is_decided, formats)):
            return False
        with self._lock:
            self._open_backend()
            new = [case for case in formats if not self._is_decided(case)]
            limit = max(0, min(MAX_NEW_CASES, MAX_CASES - len(self._decisions)))
            kernels = {case: self._kernels_of(case, formats[case]) for case in new[:limit]}
            failures = self._check({name: (case, kernel) for case, found in kernels.items()
                                    for name, kernel in found.items()}, makes_room)
            for case in new:
                found = kernels.get(case)
                self._decisions[case] = Decision((), "failed", "there are too many layouts") if (
                    found is None) else self._decision(found, failures)
        return True

    def _open_backend(self):
        """Imports the backend and reads the verdicts on its kernels, once."""
        if self._backend is not None or self.reason or self._name is None:
            return
        try:
            backend = import_backend(self._name)
            backend.open() if self._checker else backend.probe(self.device)
            with contextlib.suppress(OSError):  # on a full disk they are not kept
                self._verdicts = Verdicts.of_device(self.device, backend)
                self._lines = self._verdicts.read()
            self._backend = backend
        except WrongResult as error:
            report_wrong(f"the probe by {self._name}", self.device, error)
            self.reason = f"{self._name}: its values are wrong"
        except Exception as error:  # not installed, no compiler, no driver, an unknown GPU
            log.debug("%s does not work on %s: %r", self._name, self.device, error)
            self.reason = textwrap.shorten(f"{self._name}: {error or repr(error)}", REASON_LENGTH)
        use = f"torch, because no kernel works there ({self.reason})" if self.reason else self._name
        log.info("Packed weights on %s use %s.", device_name(self.device), use)

    def _kernels_of(self, case: Case, packed_format: Format | None) -> dict[str, Kernel]:
        """Returns a case's kernels by the names of their verdicts."""
        backend = self._backend
        found = [kernel for kernel in case.kernels(backend, packed_format)
                 if self._takes_untried or not kernel.is_untried] if backend else []
        if not found or backend is None:
            return {}
        is_quantizing = case.capability in QUANTIZING
        checks = [validation.__file__, *([quantize_validation.__file__] if is_quantizing else [])]
        parts = [*backend.files, *(Path(file) for file in checks if file)]
        if backend.platform:
            parts += made_of(backend.platform, case.capability, packed_format)
        digest = digest_of(parts)
        return {f"{case.kernel_name(backend.name, kernel)}, {digest[:8]}": kernel
                for kernel in found}

    def _check(self, kernels: Kernels, makes_room: bool) -> dict[str, str]:
        """Has kernels checked that have no verdict, and the others loaded that are right.

        Returns:
            Why nothing is known of some, by their names.
        """
        checked = self._missing(kernels)
        failures: dict[str, str] = {}
        if checked:
            with self._alone():
                if self._verdicts is not None:
                    with contextlib.suppress(OSError):
                        self._lines |= self._verdicts.read()
                checked = self._missing(kernels)
                if checked:
                    failures = self._ask(checked, makes_room)
        here = {} if self._checker else checked
        right = {name: kernel for name, kernel in kernels.items()
                 if name not in here and self._lines.get(name, {}).get("verdict") == "right"}
        return failures | ready_here(self.device, right, self._take)

    def _missing(self, kernels: Kernels) -> Kernels:
        return {name: kernel for name, kernel in kernels.items() if name not in self._lines}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes of this user from checking kernels inside the block."""
        def is_held(lock: FileLock) -> bool:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
            return lock.is_locked

        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a drive that is full or knows no locks
                lock = FileLock(private_folder(cache_folder() / "verdicts") / "lock")
                stack.callback(lock.release)
                wait(lambda: is_held(lock), LOCK_SECONDS)
            yield

    def _ask(self, kernels: Kernels, makes_room: bool) -> dict[str, str]:
        """Checks kernels, and takes the verdicts. Returns why some have none, by their names."""
        layouts = dict.fromkeys(case.layout or case.capability for case, _ in kernels.values())
        of_what = "compiler" if self.device.type == "cpu" else "driver"
        text = f"Checking kernels for {', '.join(layouts)}: once for this {of_what}"
        bar: Iterator = iter(())
        if len(kernels) > 1:  # one is there in a second, and what needs it has a bar of its own
            log.info("%s (%s).", text, device_name(self.device))
            text = textwrap.shorten(text, REASON_LENGTH, placeholder=" ...")
            bar = host.progress(text, len(kernels))
        if self._checker is None:
            return check_here(self.device, kernels, self._take, bar)
        if makes_room:
            host.free_memory(FREE_TO_BEGIN, self.device)
        assert self._name is not None  # it has been imported
        return self._checker.check(self.device, self._name, kernels, self._take, bar)

    def _take(self, name: str, verdict: str, why: str = ""):
        """Takes a verdict on a kernel, and stores it, see `Verdicts.add`."""
        if verdict not in ("begun", "open"):
            self._lines[name] = {"verdict": verdict, "why": why}
        if self._verdicts is not None:
            try:
                self._verdicts.add(name, verdict, why)
            except OSError as error:
                log.debug("A verdict cannot be kept: %r", error)
        if verdict == "wrong":
            report_wrong(name, self.device, why)
        elif verdict in ("crashed", "hung"):
            log.warning("A kernel %s on %s (%s: %s), so torch does its work, slower; please report"
                        " this line at %s.", verdict, device_name(self.device), name, why, ISSUES)
        elif verdict in ("faulty", "failed"):
            log.debug("%s is off on %s: %s, %s", name, self.device, verdict, why)

    def _decision(self, kernels: dict[str, Kernel], failures: dict[str, str]) -> Decision:
        """Returns what follows for a case from the verdicts on its kernels."""
        if not kernels:
            return Decision((), "off" if self.reason else "none", self.reason)
        right = tuple(kernel for name, kernel in kernels.items() if name not in failures
                      and self._lines.get(name, {}).get("verdict") == "right")
        first = next(iter(kernels))
        line = self._lines.get(first, {})
        if right:
            return Decision(right, "right")
        if first in failures or not line:
            return Decision((), "open", failures.get(first, ""))
        return Decision((), line["verdict"], line.get("why", ""))

    @property
    def backend_name(self) -> str | None:
        """Name of the backend in use, None where torch does the work."""
        return None if self._backend is None else self._backend.name
