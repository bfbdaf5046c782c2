"""Tries a GPU's kernels in a separate process, so that a crash or hang of one harms nothing else.

That process needs torch, the formats and the kernels, but neither ComfyUI nor its packages. Its
first line of input is a job in JSON, see `run_trial`. It ends when its input ends, so that it never
outlives its parent. It appends a line to the file of `Verdicts` before each kernel and one after
it: a first line without the second names the kernel that ended the process.

Each kernel that accepts a case is compared with torch in all that a layer may need (`check`), then
timed against torch.
"""
import contextlib
import ctypes
import faulthandler
import functools
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
from ..formats._names import format_named
from ..formats.base import Format, dequantize_by_reference
from ..layers import int8_codes
from .kernel import Backend, Case, Kernel, WrongResult
from .registry import import_backend
from .validation import check, random_tensors
from .verdicts import RETRY_AFTER_S, Verdicts

log = logging.getLogger(__name__)

FREE_TO_BEGIN = 1_500_000_000  # bytes of the device
FREE_TO_GO_ON = 1_000_000_000  # less by what the process itself takes at its start
MAX_DEVICE_BYTES = 1 << 30  # that torch may take of the device
TRIAL_SECONDS = 900  # per device; ComfyUI's next start continues where this one stopped
CASE_SECONDS = 120  # per kernel, to be compiled, checked and timed
MAX_RESTARTS = 3
WITHOUT_MEMORY = 3  # exit status
# Signals that no kernel sends. A system without memory kills what takes much of it.
FOREIGN_SIGNALS = {getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP")
                   if hasattr(signal, name)}
NICE = 10
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 1, 2  # errhandlingapi.h

ORDER = ("dequantize", "linear", "int8_rows", "int8_tokens")  # the first serves to time the second
ROWS, COLUMNS = 3072, 3072  # of a weight that is timed, at least
TOKENS = 256  # input rows of a kernel that takes any number; others get the most they take
# Timing: the shortest of several repetitions counts, each of several calls.
REPETITIONS = 5
CALLS = 4
TIMING_SECONDS = 3  # after which no further repetition starts

PACK = Path(__file__).parents[2]
# The pack's folder may have any name, an embedded Python looks for modules only in its own folders,
# and the working directory may contain anything.
START = ("import sys, types; sys.path[:] = filter(None, sys.path);"
         " pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]];"
         " sys.modules['featherweight'] = pack;"
         " from featherweight.ops.kernels import trial_process; trial_process.main()")
COMMAND = (sys.executable, "-c", START, str(PACK))


def run_trial(device: torch.device, backends: tuple[str, ...], verdicts: Verdicts,
              cases: list[Case], command: tuple[str, ...] = COMMAND,
              case_seconds: float = CASE_SECONDS) -> str:
    """Tries kernels for cases, and continues after one that ended the process.

    Args:
        device: Whose kernels are tried.
        backends: Names of backends.
        verdicts: Where the results go.
        cases: What to try.
        command: That starts the process.
        case_seconds: Per kernel.

    Returns:
        Why something is still untried, "" where nothing is.

    Raises:
        OSError: The process cannot be started, or the file cannot be written.
    """
    job = {"device": str(device), "backends": backends, "file": str(verdicts.path),
           "case_seconds": case_seconds, "cases": [case.as_json() for case in cases]}
    if free_bytes(device) < FREE_TO_BEGIN:
        return without_memory(FREE_TO_BEGIN)
    status = 0
    for _ in range(1 + MAX_RESTARTS):
        started = time.time()
        status = _run_process(command, job, TRIAL_SECONDS + case_seconds)
        log.debug("[Featherweight] The trial on %s ended with %s.", device, status)
        culprit = verdicts.results().unfinished
        if culprit is None or culprit["at"] < started:  # from an earlier ComfyUI
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
    """Returns the reason of a trial that found less free memory than `size` bytes."""
    return f"less than {size / 1e9:.1f} GB of its memory was free"


def _run_process(command: tuple[str, ...], job: dict, seconds: float) -> int:
    """Runs a trial's process for at most so many seconds. Returns its exit status."""
    process = start_process(*command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
    stdin = process.stdin
    assert stdin is not None  # it is a pipe
    try:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it may have ended already
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.flush()
            process.wait(seconds)
    finally:
        end_process(process)
        with contextlib.suppress(OSError):
            stdin.close()
    return process.returncode


def free_bytes(device: torch.device) -> float:
    """Returns the free memory of a GPU; infinity for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return math.inf


class Trial:
    """The work of a trial's process.

    Args:
        job: See `run_trial`.
    """

    def __init__(self, job: dict):
        self.device = torch.device(job["device"])
        self.case_seconds = job["case_seconds"]
        self.verdicts = Verdicts(Path(job["file"]))
        cases = filter(None, map(Case.of_json, job["cases"]))
        self.cases = sorted(cases, key=lambda case: ORDER.index(case.capability))
        self.names: list[str] = job["backends"]
        self.backends: list[Backend] = []
        self.kernel_name: str | None = None  # of the kernel or probe that is being tried
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            share = MAX_DEVICE_BYTES / torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)

    def run(self):
        """Tries all cases. Raises where torch cannot use the device: a kernel is blamed for losing
        it only if it worked before."""
        end = time.monotonic() + TRIAL_SECONDS
        self._touch_device()
        probes = [self._attempt(f"probe by {name}", functools.partial(self._probe, name))
                  for name in self.names]
        self.backends = [import_backend(name) for name, verdict in zip(self.names, probes)
                         if verdict == "works"]
        for case in self.verdicts.results().untried(self.cases):
            if time.monotonic() < end:
                self._try_case(case, probes)

    def _try_case(self, case: Case, probes: list[str]):
        verdicts = {self._attempt(case.kernel_name(backend.name, kernel),
                                  functools.partial(self._prove, kernel, packed_format, case))
                    for backend, kernel, packed_format in self._kernels(case)}
        if "stopped" not in verdicts:
            is_final = all(RETRY_AFTER_S[verdict] == math.inf for verdict in verdicts.union(probes))
            self.verdicts.add(str(case), "tried" if is_final else "tried in part")

    def stop(self):
        """Records that the kernel being tried is not to blame for the process's end."""
        if name := self.kernel_name:
            self.verdicts.add(name, "stopped", why="the process was asked to end")

    def _attempt(self, name: str, prove: Callable[[], dict]) -> str:
        """Returns the verdict on a kernel or probe, the known one or that of `prove`.

        Args:
            name: Under which the verdict is stored.
            prove: Returns a verdict's "verdict", "seconds" and "why".
        """
        if verdict := self.verdicts.results().verdict(name):
            return verdict
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if free_bytes(self.device) < FREE_TO_GO_ON:
            os._exit(WITHOUT_MEMORY)
        self.kernel_name = name
        self.verdicts.add(name, "begun")
        # This ends the process even if a kernel keeps Python from running.
        faulthandler.dump_traceback_later(self.case_seconds, exit=True)
        try:
            result = prove()
        except WrongResult as error:
            result = {"verdict": "wrong", "why": str(error)}
        except (torch.OutOfMemoryError, subprocess.TimeoutExpired) as error:  # of a compiler
            result = {"verdict": "stopped", "why": str(error)[:500]}
        except Exception as error:  # a compiler or driver may raise anything
            result = {"verdict": "refused", "why": repr(error)[:500]}
            self._end_without_device()
        self.verdicts.add(name, **result)
        self.kernel_name = None
        return result["verdict"]

    def _probe(self, name: str) -> dict:
        import_backend(name).probe(self.device)
        return {"verdict": "works"}

    def _prove(self, kernel: Kernel, packed_format: Format | None, case: Case) -> dict:
        """Checks and times a kernel. Raises WrongResult, and what the kernel raises."""
        check(kernel, packed_format, case.dtype, self.device)
        seconds = self._measure(*self._calls(kernel, packed_format, case))
        return {"verdict": "right" if seconds[0] < seconds[1] else "slower", "seconds": seconds}

    def _kernels(self, case: Case) -> list[tuple[Backend, Kernel, Format | None]]:
        """Returns the kernels that accept a case, with their backends and the case's format."""
        try:
            packed_format = None if case.format is None else format_named(case.format)
        except (KeyError, AttributeError):
            return []
        return [(backend, kernel, packed_format)
                for backend in self.backends for kernel in backend.kernels
                if kernel.capability == case.capability
                and kernel.accepts(packed_format, case.dtype)]

    def _calls(self, kernel: Kernel, packed_format: Format | None,
               case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
        """Returns a function that runs the kernel, and one that does the same by torch."""
        def empty(*size: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=self.device)

        tokens = kernel.max_tokens or TOKENS
        multiple = packed_format.block_length if packed_format else 1
        if case.capability.startswith("int8"):
            multiple = math.lcm(multiple, int8_codes.GROUP)
        rows, columns = ROWS, -(-COLUMNS // multiple) * multiple
        input = empty(tokens, columns).fill_(1)
        if packed_format is None:
            codes = empty(tokens, columns, dtype=torch.int8), empty(tokens, dtype=torch.float32)
            return (lambda: kernel.run(input, *codes),
                    lambda: int8_codes.encode_tokens(input, *codes))
        blocks = rows * columns // packed_format.block_length
        tensors = random_tensors(packed_format, blocks, self.device, bounded=True)
        values = empty(rows, columns)
        if case.capability == "int8_rows":
            codes = values, empty(rows, dtype=torch.float32)
            return (lambda: kernel.run(packed_format, tensors, *codes, 0),
                    lambda: int8_codes.encode_rows(packed_format, tensors, *codes, 0))
        if case.capability == "dequantize":
            return (lambda: kernel.run(packed_format, tensors, values, 0),
                    lambda: dequantize_by_reference(packed_format, tensors, values, 0))
        # Where no kernel multiplies, torch does, by the values that the fastest kernel dequantises.
        dequantize_case = case._replace(capability="dequantize")
        kernels = self.verdicts.results().kernels(dequantize_case, self.backends)
        dequantize = kernels[0].run if kernels else dequantize_by_reference
        out = empty(tokens, rows)
        return (lambda: kernel.run(packed_format, tensors, input, None, out),
                lambda: (dequantize(packed_format, tensors, values, 0),
                         torch.nn.functional.linear(input, values)))

    def _measure(self, *functions: Callable[[], object]) -> list[float]:
        """Returns the seconds of one call of each function.

        The shortest of several repetitions is disturbed least by other work of the device.
        """
        shortest, started = [math.inf] * len(functions), time.perf_counter()
        for repetition in range(1 + REPETITIONS):
            for index, function in enumerate(functions):
                self._synchronize()
                begun = time.perf_counter()
                for _ in range(CALLS):
                    function()
                self._synchronize()
                seconds = max(1e-9, (time.perf_counter() - begun) / CALLS)
                if repetition:  # the first one compiles and allocates
                    shortest[index] = min(shortest[index], seconds)
            if repetition and time.perf_counter() - started > TIMING_SECONDS:
                break
        return shortest

    def _synchronize(self):
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()

    def _end_without_device(self):
        """Ends the process where a kernel's fault has made the CUDA device unusable in it."""
        try:
            self._touch_device()
        except torch.OutOfMemoryError:
            pass
        except RuntimeError:
            os._exit(1)

    def _touch_device(self):
        torch.zeros(1, dtype=torch.float32, device=self.device).item()


def _end_with_input(trial: Trial):
    while sys.stdin.buffer.read(1):
        pass
    end_all()  # compilers
    trial.stop()
    os._exit(0)


def _disable_crash_reports():
    """Turns off dialogs and memory dumps after a crash, which is expected here."""
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    else:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main():
    """Runs the job on the standard input. Does not return."""
    job = json.loads(sys.stdin.readline())
    _disable_crash_reports()
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
    os._exit(status)  # without waiting for threads of backends
