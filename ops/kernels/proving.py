"""Proves a GPU's kernels in the background: `trial` tries in another process what models have asked for, once for each key.

That begins when ComfyUI starts, before any model is there; what a model asks for later is noted for the next start. A trial
starts only while much of the device is free, and one at a time. A kernel that ends or hangs its process has its verdict and is
gone past.
"""
import collections
import logging
import math
import platform
import threading
import time
from collections.abc import Callable

import torch

from ..format import Format
from . import trial_process
from .background import LOOK_EVERY, Finding, ending, is_ending, start_thread
from .case_notes import Shapes, add_notes, read_notes
from .free_memory import free_bytes
from .identity import device_name, key_of
from .own_files import cache_folder, private_folder
from .timing import TIMED
from .verdicts import Case, Proven, Verdicts, is_verdict

log = logging.getLogger(__name__)

ISSUES = "https://github.com/featherweight/ComfyUI-Featherweight/issues"
LEAST_FREE = 1_500_000_000  # bytes of the device, for a trial to begin
OWN_SHARE = 500_000_000  # of them are what the process of a trial takes before it tries anything
ASK_EVERY = 5.0  # seconds, while less is free
TRIAL_SECONDS = 900  # of this process for one device; the next one goes on where it ended
MOST_CRASHES = 3  # of a backend; after that the rest of it is not tried
LOST = ("crashed", "hung", "killed")  # how a process ends that takes the kernel it tries with it
FIRST_WAIT = 10  # seconds from its beginning on that calls wait for the file of verdicts to be read
MOST_USED = ("Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "NF4", "Q3_K")  # tried where no model has been loaded yet


class Prover:
    """names: of the backends to try. run: what takes the place of `trial_process.run_trial`."""

    def __init__(self, device: torch.device, names: tuple[str, ...], run: Callable | None = None):
        self.device, self.names, self._run = device, names, run or trial_process.run_trial
        self._changing = threading.Lock()  # held for no longer than a thread takes to start
        self._wanted: dict[Case, None] = {}  # to be tried
        self._asked: dict[Case, None] = {}  # by layers
        self._noted: set[str] = set()  # formats of which the log has said that they are tried at the next start
        self._shapes: Shapes = collections.defaultdict(set)
        self._proven: dict[Case, tuple[Proven, ...] | None] = {}  # None: it was not found out, and is not tried again
        self._at_work = self._has_told = self._lacks_room = False
        self._came: list[tuple[str, str, dict]] | None = None  # backend, text, verdict; None where no trial is under way
        self._seconds = TRIAL_SECONDS
        self._crashes = collections.Counter()
        self._waits_until = time.monotonic() + FIRST_WAIT
        self._read = Finding(self._read_verdicts)

    def proven(self, op: str, packed_format: type[Format] | None, dtype: torch.dtype,
               value_dtype: torch.dtype | None, wait: bool = False) -> tuple[Proven, ...] | None:
        """The right kernels for a case, the fastest first; None where that is not known.

        wait: for what is known from before, not for a trial.
        """
        case = Case(op, packed_format and packed_format.__name__, dtype, value_dtype)
        if case not in self._proven:
            if is_new := case not in self._asked:
                self._asked[case] = None
            if wait:
                self._wait_for_verdicts(FIRST_WAIT)
            if wait or is_new:
                self._settle()
            if is_new and case not in self._proven:
                self.note([case], {})
        return self._proven.get(case)

    def _wait_for_verdicts(self, seconds: float):
        """All waits together end `FIRST_WAIT` after the reading began."""
        self._read.wait(min(seconds, self._waits_until - time.monotonic()))

    def start(self):
        """Tries what models on this machine have asked for, or what most do where none has."""
        try:
            cases, shapes = read_notes()
        except OSError:
            self._log_failure()
            return
        self.want(cases or [Case(op, name, dtype, None) for name in MOST_USED for dtype in (torch.bfloat16, torch.float16)
                            for op in ("unpack", "linear")], shapes)

    def note(self, cases: list[Case], shapes: Shapes):
        """Has cases tried at the next start of ComfyUI, in the background. shapes: those of the model that asks."""
        self._asked.update(dict.fromkeys(cases))
        start_thread(lambda: self._note(cases, shapes), "featherweight-notes")

    def _note(self, cases: list[Case], shapes: Shapes):
        try:
            while not self._read.decided:
                if ending.wait(LOOK_EVERY):
                    return
            untried = [case for case in self._settle() if case in cases and case.op in TIMED]
            with self._changing:
                new = {case.format for case in untried if case.format and case not in self._wanted} - self._noted
                self._noted |= new
            if new:
                log.info("[Featherweight] Kernels for %s are tried on %s when ComfyUI starts next; until then torch does their"
                         " work.", ", ".join(sorted(new)), device_name(self.device))
            add_notes(cases, shapes)
        except Exception:  # a drive or driver may raise anything
            if not is_ending():
                log.debug("[Featherweight] What a model asks of kernels is not noted.", exc_info=True)

    def want(self, cases: list[Case], shapes: Shapes | None = None):
        """Has cases tried now. shapes: those of weights that will be used."""
        with self._changing:
            for name, found in (shapes or {}).items():
                self._shapes[name] |= found
            self._wanted.update(dict.fromkeys(cases))
            if not self._at_work and any(case not in self._proven for case in cases):
                self._at_work = True
                start_thread(self._work, "featherweight-trials")

    def best(self, seconds: float) -> list[str]:
        """The backends whose kernels unpack fastest what layers ask for. seconds: to wait for what is known from before."""
        self._wait_for_verdicts(seconds)
        self._settle()
        return self._fastest([case for case in list(self._asked) if case.op == "unpack"])

    def _fastest(self, cases: list[Case]) -> list[str]:
        best = [self._proven[case][0] for case in cases if self._proven.get(case)]
        return list(dict.fromkeys(kernel.backend for kernel in best if kernel.is_faster(None)))

    @property
    def at_work(self) -> bool:
        return self._at_work

    def _read_verdicts(self) -> dict[str, Verdicts]:
        try:
            folder = private_folder(cache_folder() / "verdicts")
            kept = {name: Verdicts(folder, key_of(self.device, name)) for name in self.names}
            for verdicts in kept.values():
                verdicts.read()
            return kept
        except Exception:  # a driver may raise anything
            self._log_failure()
            return {}

    def _settle(self) -> list[Case]:
        """What is known of the cases is ready to be used from here on. Returns the others."""
        all_cases = {**self._wanted, **self._asked}
        if not self._read.decided:
            return list(all_cases)
        missing = []
        known = {name: verdicts.known for name, verdicts in self._read.value.items()}
        for case in [case for case in all_cases if case not in self._proven]:
            if all(_is_tried(found, case) for found in known.values()):
                proven = [Proven(name, tuple(verdict["rows"]), verdict["times"]) for name, found in known.items()
                          for verdict in found.values() if verdict["verdict"] == "right" and verdict.get("case") == str(case)]
                self._proven[case] = tuple(sorted(proven, key=lambda kernel: kernel.share))
            else:
                missing.append(case)
        return missing

    def _work(self):
        try:
            while not self._read.decided:  # to wait for it is for who may be cancelled
                if ending.wait(LOOK_EVERY):
                    return
            while True:
                if not self._untried():
                    self._tell()
                with self._changing:
                    missing = self._untried()
                    self._at_work = bool(missing)
                if not missing:
                    return
                if not self._try(missing):
                    self._proven.update(dict.fromkeys(missing))
        except Exception:
            if not is_ending():  # when nothing is started any more
                self._log_failure()
            self._at_work = False

    def _untried(self) -> list[Case]:
        return [case for case in self._settle() if case in self._wanted]

    def _log_failure(self):
        log.warning("[Featherweight] Kernels are not tried on %s: torch does their work.", self.device, exc_info=True)

    def _tell(self):
        """What the trials since the last word have found out, or those of another process before this one began."""
        if self._came is not None:
            log.info("[Featherweight] %s: %s.", device_name(self.device), summary(self._came))
        elif not self._has_told:
            log.info("[Featherweight] Packed weights on %s use %s.", device_name(self.device),
                     " and ".join(self._fastest(list(self._proven))) or "torch")
        self._came, self._has_told = None, True

    def _try(self, cases: list[Case]) -> bool:
        """Whether anything came of it."""
        while not self._has_room():
            if ending.wait(ASK_EVERY):
                return False
        with trial_process.only_one() as alone:
            if not alone:
                return False
            for verdicts in self._read.value.values():
                verdicts.read()  # of another process, if there was one
            if not (cases := self._untried()):
                return True
            return self._try_now(cases)

    def _has_room(self) -> bool:
        if (free := free_bytes(self.device)) >= LEAST_FREE:
            return True
        if not self._lacks_room:
            log.info("[Featherweight] Kernels are tried on %s when %.1f GB of it are free; %.1f are.", device_name(self.device),
                     LEAST_FREE / 1e9, free / 1e9)
            self._lacks_room = True
        return False

    def _try_now(self, cases: list[Case]) -> bool:
        if self._came is None:
            log.info("[Featherweight] Kernels for packed weights are tried on %s in the background.", device_name(self.device))
            self._came = []
        before = len(self._came)

        def hear(backend: str, text: str, verdict: dict):
            if backend in self._read.value and is_verdict(verdict | {"at": 0}):
                self._read.value[backend].add(text, verdict)
                self._came.append((backend, text, verdict))
                if verdict["verdict"] == "wrong":
                    report_wrong(f"{text} by {backend}", self.device, verdict.get("why", ""))
                if verdict["verdict"] in ("tried", "refused"):
                    self._settle()

        while True:
            job = {"device": str(self.device), "backends": list(self.names), "cases": [case.as_json() for case in cases],
                   "shapes": {name: sorted(shapes) for name, shapes in list(self._shapes.items())},
                   "known": {name: verdicts.known for name, verdicts in self._read.value.items()},
                   "least_free": LEAST_FREE - OWN_SHARE}
            started = time.monotonic()
            outcome = self._run(job, hear, self._seconds)
            self._seconds -= time.monotonic() - started
            log.debug("[Featherweight] The trial on %s: %s", self.device, outcome)
            if outcome.how not in LOST or outcome.at is None or outcome.at[0] not in self._read.value:
                break
            hear(*outcome.at, {"verdict": outcome.how, "why": outcome.why})
            self._crashes[outcome.at[0]] += 1
            if self._crashes[outcome.at[0]] == MOST_CRASHES:
                self._skip(outcome.at[0], cases, hear)
        self._settle()
        if outcome.how == "stopped":  # for want of room; what is left is tried when there is some
            return not ending.wait(ASK_EVERY) and self._seconds > 0
        return outcome.how == "ended" and len(self._came) > before

    def _skip(self, backend: str, cases: list[Case], hear):
        why = f"{MOST_CRASHES} others of {backend} crashed, hung or were killed"
        for case in cases:
            if not _is_tried(self._read.value[backend].known, case):
                hear(backend, str(case), {"verdict": "skipped", "why": why})


def _is_tried(known: dict[str, dict], case: Case) -> bool:
    """Whether a backend has its verdict on a case: it does not work at all, or all its kernels have theirs."""
    probe = known.get("probe", {"verdict": "right"})["verdict"]
    return probe != "right" or str(case) in known


def report_wrong(case: str, device: torch.device, error):
    """Wrong values are our fault, and only who has that device can tell us of them."""
    log.warning("[Featherweight] A kernel gives wrong values here (%s on %s, torch %s, %s: %s), so torch does its work, slower;"
                " please report this line at %s.", case, device_name(device), torch.__version__,
                f"{platform.system()} {platform.release()}", error, ISSUES)


def summary(came: list[tuple[str, str, dict]]) -> str:
    """What a trial has found out, in a few words. came: backend, text and verdict."""
    counts = collections.Counter(verdict["verdict"] for _, text, verdict in came if text != "probe")
    if not counts["right"]:
        words = ["no kernel is proven, torch does the work"]
    else:
        shares = [ours / torchs for _, text, verdict in came if verdict["verdict"] == "right" and text.startswith("unpack")
                  for ours, torchs in verdict.get("times", {}).values()]
        words = [f"{counts['right']} kernels proven"]
        if shares:
            words.append(f"unpack {1 / math.prod(shares) ** (1 / len(shares)):.1f} times as fast as torch")
    words += [f"{counts[verdict]} {verdict}" for verdict in ("slower", "wrong", *LOST) if counts[verdict]]
    lost = [f"{text} by {backend}" for backend, text, verdict in came if verdict["verdict"] in ("crashed", "hung")]
    return ", ".join(words) + (f" ({'; '.join(lost)}: please report this line at {ISSUES})" if lost else "")
