"""The process that validates kernels on a GPU.

It needs torch, the formats and the kernels, but neither ComfyUI nor its packages. Its first line of
input is a job, see `ProcessValidator`. It ends when its input ends, so that it never outlives its
parent. It writes a line of `Verdicts` before each kernel and one after it, to their file and to its
standard output: a first line without the second names the kernel that ended the process.

Each kernel is compared with torch in all that a layer may need (`validate_kernel`). One that
dequantises is then timed against torch.
"""
import ctypes
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from ...child_process import end_all
from ..formats._names import formats_of_key
from ..formats.base import dequantize_by_reference
from .kernel import Backend, Case, Kernel
from .registry import import_backend
from .validation import random_tensors
from .validator import JOB_SECONDS, WITHOUT_MEMORY, free_bytes, validate_kernel
from .verdicts import Verdicts

FREE_TO_GO_ON = 1_000_000_000  # bytes of the device, less by what the process itself takes
MAX_DEVICE_BYTES = 1 << 30  # that torch may take of the device
NICE = 10
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 1, 2  # errhandlingapi.h

VALUES = 3072 * 3072  # of a weight that is timed, at least
# Timing: the shortest of several repetitions counts, each of several calls.
REPETITIONS = 5
CALLS = 4
TIMING_SECONDS = 3  # after which no further repetition starts


class Validation:
    """The work of the process.

    Args:
        job: See `ProcessValidator`.
        results: Where lines are written to.
    """

    def __init__(self, job: dict, results):
        self.device = torch.device(job["device"])
        self.kernel_seconds = job["kernel_seconds"]
        self.backend_name: str = job["backend"]
        self.cases = list(filter(None, map(Case.of_text, job["cases"])))
        self.name: str | None = None  # of the kernel that is being validated
        self._verdicts = Verdicts(Path(job["file"]))
        self._results = results
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            share = MAX_DEVICE_BYTES / torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)

    def run(self):
        """Validates the kernels of all cases. Raises where torch cannot use the device: a kernel is
        blamed for losing it only if it worked before."""
        end = time.monotonic() + JOB_SECONDS
        self._touch_device()
        backend = import_backend(self.backend_name)
        reason = self._probe(backend)
        known = self._verdicts.read()
        for case in self.cases:
            packed_format = None if case.layout is None else formats_of_key(case.layout)[0]
            for kernel in case.kernels(backend, packed_format):
                name = case.kernel_name(backend.name, kernel)
                if name in known or time.monotonic() > end:
                    continue
                if reason:
                    self.add(name, verdict="refused", why=reason)
                else:
                    self._validate(name, case, kernel)

    def _probe(self, backend: Backend) -> str:
        """Returns why the backend does not work, "" where it does."""
        try:
            backend.probe(self.device)
        except Exception as error:  # a compiler or driver may raise anything
            self._end_without_device()
            return repr(error)[:500]
        return ""

    def _validate(self, name: str, case: Case, kernel: Kernel):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if free_bytes(self.device) < FREE_TO_GO_ON:
            os._exit(WITHOUT_MEMORY)
        self.name = name
        self.add(name, verdict="begun")
        # This ends the process even if a kernel keeps Python from running.
        faulthandler.dump_traceback_later(self.kernel_seconds, exit=True)
        result = validate_kernel(kernel, case, self.device)
        if result["verdict"] == "right" and case.capability == "dequantize":
            seconds = self._measure(*self._calls(kernel, case))
            result = {"verdict": "right" if seconds[0] < seconds[1] else "slow", "seconds": seconds}
        elif result["verdict"] == "refused":
            self._end_without_device()
        self.add(name, **result)
        self.name = None

    def add(self, name: str, **line):
        """Stores a line and hands it to the parent."""
        line = self._verdicts.add(name, **line)
        self._results.write(json.dumps(line) + "\n")
        self._results.flush()

    def _calls(self, kernel: Kernel, case: Case) -> tuple[Callable[[], object], ...]:
        """Returns a function that runs the kernel, and one that does the same by torch."""
        packed_format = formats_of_key(case.layout or "")[-1]
        blocks = -(-VALUES // packed_format.block_length)
        tensors = random_tensors(packed_format, blocks, self.device, bounded=True)
        values = torch.empty(blocks * packed_format.block_length, dtype=case.dtype,
                             device=self.device)
        return (lambda: kernel.run(packed_format, tensors, values, 0),
                lambda: dequantize_by_reference(packed_format, tensors, values, 0))

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


def _end_with_input(validation: Validation):
    while sys.stdin.buffer.read(1):
        pass
    end_all()  # compilers
    if name := validation.name:  # it is not to blame for the process's end
        validation.add(name, verdict="stopped", why="the process was asked to end")
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
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # drivers and compilers may write there
    _disable_crash_reports()
    faulthandler.dump_traceback_later(job["kernel_seconds"], exit=True)
    psutil.Process().nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", NICE))
    validation, status = Validation(job, results), 0
    threading.Thread(target=_end_with_input, args=(validation,), daemon=True).start()
    try:
        with torch.inference_mode():
            validation.run()
    except BaseException:
        status = 2
    os._exit(status)  # without waiting for threads of backends
