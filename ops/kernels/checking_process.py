"""The process that checks kernels on a GPU.

It needs torch, the formats and the kernels, but neither ComfyUI nor its packages. Each line of its
input is a job, see `ProcessChecker`. It ends when its input ends, so that it never outlives its
parent, and after a minute without a job. It writes a line of JSON before each kernel and one after
it: a first line without the second names the kernel that ended the process.
"""
import contextlib
import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading

import psutil
import torch

from ...child_process import end_all
from ..formats._names import formats_of_key
from .checker import TOO_LITTLE_MEMORY, free_bytes, verdict_on
from .kernel import Backend, Case, Kernel
from .registry import import_backend
from .verdicts import Verdicts, being_checked, withdraw_all

FREE_TO_GO_ON = 1_000_000_000  # bytes of the device, less by what the process itself takes
MAX_DEVICE_BYTES = 1 << 30  # that torch may take of the device
IDLE_SECONDS = 60
NICE = 10
SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX = 1, 2  # errhandlingapi.h


class Checks:
    """The work of the process. results: where lines are written to."""

    def __init__(self, results):
        self._results = results
        self._backends: dict[tuple[str, torch.device], Backend] = {}

    def run(self, job: dict):
        """Checks the kernels of a job, and writes why the rest has no verdict, "" if all have."""
        device = torch.device(job["device"])
        try:
            backend = self._backend(job["backend"], device)
            for capability, layout, dtype in job["cases"]:
                case = Case(capability, layout, getattr(torch, dtype))
                packed_format = None if layout is None else formats_of_key(layout)[0]
                for kernel in case.kernels(backend, packed_format):
                    name = case.kernel_name(backend.name, kernel)
                    if name in job["kernels"]:
                        with _begun(job["kernels"][name], device, backend):
                            self._check(name, kernel, case, device, job["seconds"])
            why = ""
        except Exception as error:  # a driver may raise anything
            why = str(error)[:500] or repr(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a model may take it now
        self._write(done=True, why=why)

    def _backend(self, name: str, device: torch.device) -> Backend:
        """Returns a backend that works on a device. Raises where it does not: a kernel is blamed
        for losing the device only if that worked before."""
        if (name, device) not in self._backends:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                share = MAX_DEVICE_BYTES / torch.cuda.mem_get_info(device)[1]
                torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
            _touch(device)
            backend = import_backend(name)
            backend.probe(device)
            self._backends[name, device] = backend
        return self._backends[name, device]

    def _check(self, name: str, kernel: Kernel, case: Case, device: torch.device, seconds: float):
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if free_bytes(device) < FREE_TO_GO_ON:
            raise MemoryError(TOO_LITTLE_MEMORY)
        self._write(kernel=name, verdict="begun")
        # This ends the process even if a kernel keeps Python from running.
        faulthandler.dump_traceback_later(seconds, exit=True)
        verdict, why = verdict_on(kernel, case, device)
        if verdict != "right":
            _end_without_device(device)
        faulthandler.cancel_dump_traceback_later()
        self._write(kernel=name, verdict=verdict, why=why)

    def _write(self, **line):
        self._results.write(json.dumps(line) + "\n")
        self._results.flush()


@contextlib.contextmanager
def _begun(name: str, device: torch.device, backend: Backend):
    """Has a check that the end of the parent ends withdrawn: the parent stores no more."""
    with contextlib.suppress(OSError):
        being_checked[name] = Verdicts.of_device(device, backend)
    yield
    being_checked.pop(name, None)


def _touch(device: torch.device):
    torch.zeros(1, dtype=torch.float32, device=device).item()


def _end_without_device(device: torch.device):
    """Ends the process where a kernel's fault has made the CUDA device unusable in it."""
    try:
        _touch(device)
    except torch.OutOfMemoryError:
        pass
    except RuntimeError:
        os._exit(1)


def _read_jobs(jobs: "queue.SimpleQueue[dict]"):
    for line in sys.stdin.buffer:
        jobs.put(json.loads(line))
    withdraw_all()
    end_all()  # compilers
    os._exit(0)


def _disable_crash_reports():
    """Turns off dialogs and memory dumps after a crash, which is expected here."""
    if sys.platform == "win32":
        ctypes.windll.kernel32.SetErrorMode(SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX)
    else:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main():
    """Runs the jobs on the standard input. Does not return."""
    checks = Checks(os.fdopen(os.dup(1), "w"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # drivers and compilers may write there
    _disable_crash_reports()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it withdraws its check after its parent's end
    psutil.Process().nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", NICE))
    jobs: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    try:
        with torch.inference_mode():
            while True:
                checks.run(jobs.get(timeout=IDLE_SECONDS))
    except queue.Empty:
        os._exit(0)
    except BaseException:
        os._exit(2)  # without waiting for threads of backends
