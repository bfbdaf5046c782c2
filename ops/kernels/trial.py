"""Tries a GPU's kernels in a process of its own: one that crashes or hangs takes nothing with it.

That process needs torch, the formats and the kernels, neither ComfyUI nor its packages. Its first
line of input is a job in JSON, see `run_trial`; it ends when its input does, so that none outlives
who started it. To the file of `Verdicts` it appends a line before each kernel and one after it: a
first line without the second names what ended the process.

Each kernel that accepts a case is held to torch in all that it may meet (`check`), then timed
beside torch.
"""
import contextlib
import ctypes
import faulthandler
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from ...child_process import end_all, end_process, is_ending, start_process
from .. import int8_codes
from ..format import Format
from ..formats._names import format_named
from .kernel import Backend, Case, Kernel, WrongResult, compute_capability
from .registry import import_backend
from .validation import check, random_tensors
from .verdicts import RETRY_AFTER_S, Verdicts

log = logging.getLogger(__name__)

FREE_TO_BEGIN = 1_500_000_000  # bytes of the device
FREE_TO_GO_ON = 1_000_000_000  # the difference is what the process takes before it tries anything
MAX_DEVICE_BYTES = 1 << 30  # that torch may take of the device
TRIAL_SECONDS = 900  # of one device; the next start of ComfyUI goes on where it ended
CASE_SECONDS = 120  # that a kernel may take to be compiled, checked and timed
MAX_RESTARTS = 3
WITHOUT_MEMORY = 3  # exit status
# Signals that no kernel sends. A system without memory kills what takes much, whoever it is.
FOREIGN_SIGNALS = {getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP")
                   if hasattr(signal, name)}
NICE = 10
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 1, 2  # errhandlingapi.h

ORDER = ("dequantize", "linear", "int8_rows", "int8_tokens")  # the second is timed with the first
ROWS, COLUMNS = 3072, 3072  # of a weight that is timed, at least
TOKENS = 256  # of the input of a kernel that takes any number; others get the most they take
TURNS, CALLS = 5, 4  # the least time of so many turns counts, of so many calls each
TIMING_SECONDS = 3  # after which no other turn is made

PACK = Path(__file__).parents[2]
# The pack's folder has any name, an embedded Python looks for modules in no folder but its own, and
# the one it works in may hold anything.
START = ("import sys, types; sys.path[:] = filter(None, sys.path);"
         " pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]];"
         " sys.modules['featherweight'] = pack;"
         " from featherweight.ops.kernels import trial; trial.main()")
COMMAND = (sys.executable, "-c", START, str(PACK))


def run_trial(device: torch.device, backends: tuple[str, ...], verdicts: Verdicts,
              cases: list[Case], command: tuple[str, ...] = COMMAND,
              case_seconds: float = CASE_SECONDS) -> str:
    """Tries kernels for cases, and goes on behind one that ended the process.

    Returns:
        Why something is left untried, "" where nothing is.

    Raises:
        OSError
    """
    job = {"device": str(device), "backends": backends, "file": str(verdicts.path),
           "case_seconds": case_seconds, "cases": [case.as_json() for case in cases]}
    if free_bytes(device) < FREE_TO_BEGIN:
        return without_memory(FREE_TO_BEGIN)
    for _ in range(1 + MAX_RESTARTS):
        started = time.time()
        status = _run_process(command, job, TRIAL_SECONDS + case_seconds)
        log.debug("[Featherweight] The trial on %s ended with %s.", device, status)
        culprit = verdicts.results().unfinished
        if culprit is None or culprit["at"] < started:  # of an earlier ComfyUI
            break
        verdict = "killed" if -status in FOREIGN_SIGNALS else "crashed"
        if time.time() - culprit["at"] >= case_seconds:
            verdict = "hung"
        if is_ending():
            verdict = "stopped"
        verdicts.add(culprit["name"], verdict, why=f"its process ended with {status}")
        if is_ending():
            break
    else:
        return f"{MAX_RESTARTS + 1} kernels ended their process"
    if status == WITHOUT_MEMORY:
        return without_memory(FREE_TO_GO_ON)
    return f"its process ended with {status}" if status else ""


def without_memory(size: int) -> str:
    return f"less than {size / 1e9:.1f} GB of it were free"


def _run_process(command: tuple[str, ...], job: dict, seconds: float) -> int:
    """The exit status of a trial's process."""
    process = start_process(*command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    try:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it may be gone already
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            process.wait(seconds)
    finally:
        end_process(process)
        with contextlib.suppress(OSError):
            process.stdin.close()
    return process.returncode


def free_bytes(device: torch.device) -> float:
    """Of a GPU; infinity of a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return math.inf


class Trial:
    """What the process does. job: see `run_trial`."""

    def __init__(self, job: dict):
        self.device, self.case_seconds = torch.device(job["device"]), job["case_seconds"]
        self.verdicts = Verdicts(Path(job["file"]))
        self.cases = sorted(map(Case.of_json, job["cases"]),
                            key=lambda case: ORDER.index(case.capability))
        self.names, self.backends = job["backends"], []
        self.compute_capability = compute_capability(self.device)
        self.kernel_name: str | None = None  # of what is tried now
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            share = MAX_DEVICE_BYTES / torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)

    def run(self):
        """Raises where torch can do nothing there, so that what is lost later a kernel has lost."""
        end = time.monotonic() + TRIAL_SECONDS
        self._touch_device()
        probes = [self._attempt(f"probe by {name}", lambda: self._probe(name))
                  for name in self.names]
        self.backends = [import_backend(name) for name, verdict in zip(self.names, probes)
                         if verdict == "works"]
        for case in self.verdicts.results().untried(self.cases):
            if time.monotonic() < end:
                verdicts = {self._attempt(case.kernel_name(backend.name, kernel),
                                          lambda: self._prove(kernel, packed_format, case))
                            for backend, kernel, packed_format in self._kernels(case)}
                if "stopped" not in verdicts:
                    is_final = all(RETRY_AFTER_S[verdict] == math.inf
                                   for verdict in verdicts.union(probes))
                    self.verdicts.add(str(case), "tried" if is_final else "tried in part")

    def stop(self):
        """What is tried now is told to be no fault of the kernel's."""
        if name := self.kernel_name:
            self.verdicts.add(name, "stopped", why="this process was told to end")

    def _attempt(self, name: str, prove: Callable[[], dict]) -> str:
        """The verdict, known or found out now."""
        if known := self.verdicts.results().verdict(name):
            return known
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if free_bytes(self.device) < FREE_TO_GO_ON:
            os._exit(WITHOUT_MEMORY)
        self.kernel_name = name
        self.verdicts.add(name, "begun")
        # Ends this process though a kernel should let no Python run.
        faulthandler.dump_traceback_later(self.case_seconds, exit=True)
        try:
            verdict = prove()
        except WrongResult as error:
            verdict = {"verdict": "wrong", "why": str(error)}
        except (torch.OutOfMemoryError, subprocess.TimeoutExpired) as error:  # of a compiler
            verdict = {"verdict": "stopped", "why": str(error)[:500]}
        except Exception as error:  # a compiler or driver may raise anything
            verdict = {"verdict": "refused", "why": repr(error)[:500]}
            self._end_without_device()
        self.verdicts.add(name, **verdict)
        self.kernel_name = None
        return verdict["verdict"]

    def _probe(self, name: str) -> dict:
        import_backend(name).probe(self.device)
        return {"verdict": "works"}

    def _prove(self, kernel: Kernel, packed_format: type[Format] | None, case: Case) -> dict:
        check(kernel, packed_format, case.dtype, case.value_dtype, self.device)
        seconds = self._seconds(*self._calls(kernel, packed_format, case))
        return {"verdict": "right" if seconds[0] < seconds[1] else "slower", "seconds": seconds}

    def _kernels(self, case: Case) -> list[tuple[Backend, Kernel, type[Format] | None]]:
        """Those that accept a case, each with the case's format."""
        try:
            packed_format = None if case.format is None else format_named(case.format)
        except (KeyError, AttributeError):
            return []
        return [(backend, kernel, packed_format)
                for backend in self.backends for kernel in backend.kernels
                if kernel.capability == case.capability
                and kernel.accepts(packed_format, case.dtype, self.compute_capability)]

    def _calls(self, kernel: Kernel, packed_format: type[Format] | None,
               case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
        """The kernel's work, and the same by torch."""
        def empty(*size: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=self.device)

        multiple = packed_format.block_length if packed_format else 1
        if case.capability.startswith("int8"):
            multiple = math.lcm(multiple, int8_codes.GROUP)
        columns = -(-COLUMNS // multiple) * multiple
        rows, tokens = ROWS, kernel.max_tokens or TOKENS
        input = empty(tokens, columns).fill_(1)
        if case.capability == "int8_tokens":
            codes = empty(tokens, columns, dtype=torch.int8), empty(tokens, dtype=torch.float32)
            return (lambda: kernel.run(input, *codes),
                    lambda: int8_codes.encode_tokens(input, *codes))
        blocks = rows * columns // packed_format.block_length
        weight = packed_format, random_tensors(packed_format, blocks, self.device, calm=True)
        values, value_dtype = empty(rows, columns), case.rounded_dtype
        if case.capability == "int8_rows":
            codes = values, empty(rows, dtype=torch.float32)
            return (lambda: kernel.run(*weight, *codes, case.value_dtype, 0),
                    lambda: int8_codes.encode_rows(*weight, *codes, case.value_dtype, 0))
        if case.capability == "dequantize":
            return (lambda: kernel.run(*weight, values, value_dtype, 0),
                    lambda: _dequantize_by_torch(*weight, values, value_dtype, 0))
        # Where no kernel multiplies, torch does with what the fastest one has dequantised.
        dequantize = case._replace(capability="dequantize", value_dtype=value_dtype)
        fastest = [
            kernel.run for kernel in self.verdicts.results().kernels(dequantize, self.backends)
        ]
        dequantize_into, out = [*fastest, _dequantize_by_torch][0], empty(tokens, rows)
        return (lambda: kernel.run(*weight, input, None, out, case.value_dtype),
                lambda: (dequantize_into(*weight, values, value_dtype, 0),
                         torch.nn.functional.linear(input, values)))

    def _seconds(self, *calls: Callable[[], object]) -> list[float]:
        """Of each: the least of several turns is disturbed least by what else the device does."""
        least, started = [math.inf] * len(calls), time.perf_counter()
        for turn in range(1 + TURNS):
            for index, call in enumerate(calls):
                self._synchronize()
                begun = time.perf_counter()
                for _ in range(CALLS):
                    call()
                self._synchronize()
                seconds = max(1e-9, (time.perf_counter() - begun) / CALLS)
                if turn:  # the first compiles and allocates
                    least[index] = min(least[index], seconds)
            if turn and time.perf_counter() - started > TIMING_SECONDS:
                break
        return least

    def _synchronize(self):
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def _end_without_device(self):
        """After a kernel's fault all that is done on a CUDA device fails in this process."""
        try:
            self._touch_device()
        except torch.OutOfMemoryError:
            pass
        except RuntimeError:
            os._exit(1)

    def _touch_device(self):
        torch.zeros(1, dtype=torch.float32, device=self.device).item()


def _dequantize_by_torch(packed_format, tensors, out, value_dtype, first):
    packed_format.dequantize_into(tensors, out, value_dtype, first)


def _end_with_input(trial: Trial):
    while sys.stdin.buffer.read(1):
        pass
    end_all()  # compilers
    trial.stop()
    os._exit(0)


def _leave_no_dump():
    """A crash here is nothing that a user should be asked about, or find memory of in a file."""
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    else:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main():
    job = json.loads(sys.stdin.readline())
    _leave_no_dump()
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    psutil.Process().nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", NICE))
    trial, status = Trial(job), 0
    threading.Thread(target=_end_with_input, args=(trial,), daemon=True).start()
    try:
        with torch.inference_mode():
            trial.run()
    except BaseException as error:
        trial.verdicts.append(failed=repr(error)[:500])
        status = 2
    os._exit(status)  # what backends left running is not waited for
