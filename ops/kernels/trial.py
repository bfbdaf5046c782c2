"""Tries kernels in a process of its own, where one that crashes or hangs takes nothing with it: `python -m ops.kernels.trial`.

It needs torch, the formats and the kernels, neither ComfyUI nor its packages. Its first line of input is a job in JSON:

    {"device": "cuda:0", "backends": ["triton"], "cases": [["linear", "Q4_K", "bfloat16", null]],
     "shapes": {"Q4_K": [[3072, 12288]]}, "known": {"triton": {...}}, "least_free": 1000000000, "seconds": 900}

shapes: (N, K) of weights to time with. known: verdicts as `Verdicts.read` gives them, which are not found out again.
least_free: bytes of the device, with less of which it stops. seconds: after which it ends, whatever it is at. It also ends when
its input does, so that none outlives who started it.

Output are lines of JSON: {"trying": [backend, text]} before each attempt, {"backend", "text", "verdict"} after it, and
{"stopped": why} or {"failed": why} where it ends before all is tried, for want of room or for another reason. What backends
print goes nowhere.

Each kernel that accepts a case is held to torch in all that it may meet (`check`), then timed beside torch.
"""
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import torch

from ..formats._names import format_named
from .backends import import_backend
from .check import WrongResult, check
from ...child_process import end_all
from .free_memory import free_bytes
from .timing import Timing, value_dtype_of
from .verdicts import Case, kernel_text

ORDER = ("unpack", "linear")  # first: torch's product is timed with the fastest of what unpacks
NICE = 10
MOST_BYTES = 1 << 30  # that torch may take of the device
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 1, 2  # errhandlingapi.h


class Trial:
    """job: see above. say: called with each line."""

    def __init__(self, job: dict, say: Callable[[dict], None]):
        self.device, self.backends, self.known = torch.device(job["device"]), job["backends"], job["known"]
        self.cases = sorted(map(Case.of_json, job["cases"]),
                            key=lambda case: ORDER.index(case.op) if case.op in ORDER else len(ORDER))
        self.least_free, self.say = job["least_free"], say
        self.timing = Timing(self.device, job["shapes"])
        self.capability = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, MOST_BYTES / total), self.device)
            if torch.version.hip is None:
                self.capability = torch.cuda.get_device_capability(self.device)

    def run(self):
        self._stop_without_room()
        self._touch_the_device()
        working = {}
        for name in self.backends:
            backend = self._attempt(name, "probe", lambda: self._probe(name))
            if backend["verdict"] == "right":
                working[name] = import_backend(name)
        self._add_what_is_known(working)
        for case in self.cases:
            for name, backend in working.items():
                if str(case) not in self.known.get(name, {}):
                    self._try(name, backend, case)
                    self._report(name, str(case), {"verdict": "tried"})

    def _add_what_is_known(self, working: dict):
        """What unpacks for torch's products may have been found right by a trial before this one."""
        unpack = {Case("unpack", *case[1:3], value_dtype_of(case)) for case in self.cases if case.op == "linear"}
        for case in unpack:
            for name, backend in working.items():
                for kernel, packed_format in self._kernels(backend, case):
                    known = self.known.get(name, {}).get(kernel_text(case, _rows(kernel)), {})
                    if known.get("verdict") == "right":
                        self.timing.add(kernel, packed_format, case)

    def _kernels(self, backend, case: Case) -> list[tuple]:
        """Those of a backend that accept a case, each with its format."""
        try:
            packed_format = None if case.format is None else format_named(case.format)
        except (KeyError, AttributeError):
            return []
        return [(kernel, packed_format) for kernel in backend.kernels
                if kernel.op == case.op and kernel.accepts(packed_format, case.dtype, self.capability)]

    def _try(self, name, backend, case: Case):
        for kernel, packed_format in self._kernels(backend, case):
            verdict = self._attempt(name, kernel_text(case, _rows(kernel)),
                                    lambda kernel=kernel: self._prove(kernel, packed_format, case),
                                    {"case": str(case), "rows": _rows(kernel)})
            if verdict["verdict"] == "right":
                self.timing.add(kernel, packed_format, case)

    def _probe(self, name: str) -> dict:
        import_backend(name).probe(self.device)
        return {"verdict": "right"}

    def _prove(self, kernel, packed_format, case: Case) -> dict:
        check(kernel, packed_format, case.dtype, case.value_dtype, self.device)
        times = self.timing.times(kernel, packed_format, case)
        faster = not times or any(ours < torchs for ours, torchs in times.values())
        return {"verdict": "right" if faster else "slower", "times": times}

    def _attempt(self, name: str, text: str, find_out: Callable[[], dict], about: dict | None = None) -> dict:
        """The verdict, known or found out now."""
        if text in self.known.get(name, {}):
            return self.known[name][text]
        self._stop_without_room()
        self.say({"trying": [name, text]})
        try:
            verdict = find_out()
        except subprocess.TimeoutExpired as error:  # a compiler that others kept from working: that says nothing of a kernel
            self._stop(str(error))
        except WrongResult as error:
            verdict = {"verdict": "wrong", "why": str(error)}
        except torch.OutOfMemoryError as error:
            verdict = {"verdict": "memory", "why": str(error)[:500]}
        except Exception as error:  # a compiler or driver may raise anything
            verdict = {"verdict": "refused", "why": repr(error)[:500]}
        if verdict["verdict"] == "refused":
            self._crash_if_the_device_is_lost()
        verdict |= about or {}
        self._report(name, text, verdict)
        return verdict

    def _report(self, name: str, text: str, verdict: dict):
        self.say({"backend": name, "text": text, "verdict": verdict})

    def _stop_without_room(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if (free := free_bytes(self.device)) < self.least_free:
            self._stop(f"{free:.0f} bytes are free")

    def _stop(self, why: str) -> NoReturn:
        self.say({"stopped": why})
        os._exit(0)

    def _crash_if_the_device_is_lost(self):
        """After a fault of a kernel everything on a CUDA device fails in this process, which is no fault of what comes next."""
        try:
            self._touch_the_device()
        except torch.OutOfMemoryError:
            pass
        except RuntimeError:
            os._exit(1)

    def _touch_the_device(self):
        """Raises where torch can do nothing there; so what is lost later was lost to a kernel."""
        torch.zeros(1, dtype=torch.float32, device=self.device).item()


def _rows(kernel) -> list:
    return [kernel.min_tokens, kernel.max_tokens]


def _speaker() -> Callable[[dict], None]:
    """Writes a line to what is standard output now. From here on nothing else reaches that."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(nowhere, standard)

    def say(line: dict):
        lines.write(json.dumps(line) + "\n")
        lines.flush()
    return say


def _end_with_input():
    while sys.stdin.buffer.read(1):
        pass
    end_all()  # compilers
    os._exit(0)


def _leave_no_dump():
    """A crash here is nothing that a user should be asked about, or find the memory of in a file."""
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    else:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_in_time(seconds: float):
    """Where a kernel keeps this process from running any Python, the system ends it: after that time, and with its parent."""
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(seconds))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main():
    say = _speaker()
    job = json.loads(sys.stdin.readline())
    _leave_no_dump()
    _end_in_time(job["seconds"])
    threading.Thread(target=_end_with_input, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(NICE)
    try:
        with torch.inference_mode():
            Trial(job, say).run()
    except BaseException as error:
        say({"failed": repr(error)[:500]})
    os._exit(0)  # what backends left running is not waited for


if __name__ == "__main__":
    main()
