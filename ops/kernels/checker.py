"""Checks kernels: in this process, or in another one, where a crash or hang harms nothing else."""
import contextlib
import functools
import json
import math
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...child_process import end_process, is_ending, start_process
from ..formats._names import formats_of_key
from .kernel import Case, CompilerError, Kernel, SourceError, WrongResult, dtype_name
from .validation import check
from .waiting import WAIT_INTERVAL_SECONDS, host, side_by_side, start_thread

Kernels = dict[str, tuple[Case, Kernel]]  # by the names of their verdicts
Take = Callable[[str, str, str], None]  # takes the name of a kernel, its verdict, and why

FREE_TO_BEGIN = 1_500_000_000  # bytes of the device
TOO_LITTLE_MEMORY = f"less than {FREE_TO_BEGIN / 1e9:.1f} GB of its memory was free"
KERNEL_SECONDS = 60  # to be compiled and checked
START_SECONDS = 120  # until torch is imported, on a slow drive
GRACE_SECONDS = 5  # by which a kernel that hangs should have ended the process
MAX_RESTARTS = 3
# Signals that no kernel sends. A system without memory kills what takes much of it.
FOREIGN_SIGNALS = {getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP")
                   if hasattr(signal, name)}

PACK = Path(__file__).parents[2]
# The pack's folder may have any name, an embedded Python looks for modules only in its own folders,
# and the working directory may contain anything.
START = ("import sys, types; sys.path[:] = filter(None, sys.path);"
         " pack = sys.modules.setdefault('featherweight', types.ModuleType('featherweight'));"
         " pack.__path__ = [sys.argv[1]];"
         " import featherweight.ops.kernels.checking_process as module; module.main()")
# with the same flags: what "-s" leaves out, as portable ComfyUI does, may be another torch
FLAGS = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
COMMAND = sys.executable, *FLAGS, "-c", START, str(PACK)


def verdict_on(kernel: Kernel, case: Case, device: torch.device,
               is_quick: bool = False) -> tuple[str, str]:
    """Compares a kernel with the reference on a device, in all that a layer may need of it.

    Args:
        kernel, case, device: What is checked.
        is_quick: Whether the smallest case will do, for a kernel that is proven.

    Returns:
        "right", "wrong", "faulty", "failed", or "open" where nothing is known, and why.
    """
    try:
        packed_format = None if case.layout is None else formats_of_key(case.layout)[0]
        check(kernel, packed_format, case.dtype, device, is_quick)
    except WrongResult as error:
        return "wrong", str(error)
    except SourceError as error:
        return "faulty", str(error)[:500]
    except (torch.OutOfMemoryError, MemoryError, OSError, subprocess.TimeoutExpired,
            CompilerError) as error:
        return "open", str(error)[:500] or repr(error)
    except Exception as error:  # a compiler or driver may raise anything
        is_open = is_ending() or "out of memory" in str(error)  # as drivers say it
        return ("open" if is_open else "failed"), repr(error)[:500]
    return "right", ""


def check_here(device: torch.device, kernels: Kernels, take: Take, bar: Iterator,
               is_quick: bool = False) -> dict[str, str]:
    """Checks kernels in this process, those of a CPU side by side, since each waits for a compiler.

    Args:
        device: Theirs.
        kernels: To check.
        take: Takes each verdict.
        bar: Is advanced after each.
        is_quick: See `verdict_on`.

    Returns:
        Why there is none on some, by their names.

    Raises:
        Exception: What `host.raise_if_cancelled` raises.
    """
    failures: dict[str, str] = {}

    def check_one(name: str, case: Case, kernel: Kernel):
        verdict, why = verdict_on(kernel, case, device, is_quick)
        if verdict == "open":
            failures[name] = why
        elif verdict != "right" or not is_quick:
            take(name, verdict, why)

    works = [functools.partial(check_one, name, *kernel) for name, kernel in kernels.items()]
    if device.type == "cpu":
        for _ in side_by_side(works, max(2, torch.get_num_threads())):
            next(bar, None)
        return failures
    for work in works:  # torch must command an Apple GPU from one thread at a time
        host.raise_if_cancelled()
        work()
        next(bar, None)
    return failures


def ready_here(device: torch.device, kernels: Kernels, take: Take) -> dict[str, str]:
    """Has this process load kernels that are proven: what compiles, loads or first launches one in
    a step may find no memory. Returns as `check_here` does."""
    return check_here(device, kernels, take, iter(()), is_quick=True)


def free_bytes(device: torch.device) -> float:
    """Returns the free memory of a GPU; infinity for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class ProcessChecker:
    """Another process, which checks the kernels of GPUs for the loads of a prompt.

    It starts when it is needed, and ends a minute after that, or with this process.

    Args:
        command: That starts it, see `checking_process`.
        kernel_seconds: That a kernel may take.
    """

    def __init__(self, command: tuple[str, ...] = COMMAND, kernel_seconds: float = KERNEL_SECONDS):
        self._command, self._kernel_seconds = command, kernel_seconds
        self._process: Any = None
        self._lines: queue.SimpleQueue[dict | None] = queue.SimpleQueue()

    def check(self, device: torch.device, backend: str, kernels: Kernels, take: Take,
              bar: Iterator) -> dict[str, str]:
        """Checks kernels, and goes on after one that ended the process; see `check_here`."""
        if free_bytes(device) < FREE_TO_BEGIN:
            return dict.fromkeys(kernels, TOO_LITTLE_MEMORY)
        failures: dict[str, str] = {}
        waiting, reason = dict(kernels), f"{MAX_RESTARTS + 1} kernels ended their process"
        for _ in range(1 + MAX_RESTARTS):
            names = {case.kernel_name(backend, kernel): name
                     for name, (case, kernel) in waiting.items()}
            job = {"device": str(device), "backend": backend, "seconds": self._kernel_seconds,
                   "cases": [(case.capability, case.layout, dtype_name(case.dtype))
                             for case in dict.fromkeys(case for case, _ in waiting.values())],
                   "kernels": names}
            begun, since = "", time.monotonic()
            try:
                self._send(job)
                while True:
                    line = self._next_line(self._kernel_seconds if begun else START_SECONDS)
                    verdict, why = str(line.get("verdict", "")), str(line.get("why", ""))
                    name = names.get(str(line.get("kernel")), "")
                    if "done" in line:
                        return failures | dict.fromkeys(waiting, why)
                    if name in waiting and verdict == "begun":
                        begun, since = name, time.monotonic()
                        take(name, verdict, "")
                    elif name and name == begun:
                        begun = ""
                        del waiting[name]
                        next(bar, None)
                        take(name, verdict, why)
                        if verdict == "open":
                            failures[name] = why
            except EOFError:
                status = self.end()
                why = f"the process that checks kernels ended with {status}" if status else ""
            except OSError as error:  # it did not start, or writes nothing
                status, why = self.end(), str(error) or "the process that checks kernels hangs"
            except BaseException:  # the user cancelled
                self.end()
                if begun:
                    take(begun, "open", "")
                raise
            if begun:
                del waiting[begun]
                why = f"its process ended with {status}"
                if time.monotonic() - since >= self._kernel_seconds:
                    take(begun, "hung", f"it took more than {self._kernel_seconds:g} s")
                elif -status in FOREIGN_SIGNALS or is_ending():
                    failures[begun] = why
                    take(begun, "open", why)
                else:
                    take(begun, "crashed", why)
            elif why:
                reason = why
                break
            if is_ending() or not waiting:
                break
        return failures | dict.fromkeys(waiting, reason)

    def _send(self, job: dict):
        if self._process is None or self._process.poll() is not None:
            self._process = process = start_process(
                *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL)
            self._lines = lines = queue.SimpleQueue()
            start_thread(lambda: _read_lines(process, lines), "featherweight-checks")
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def _next_line(self, seconds: float) -> dict:
        """Returns the next line of the process.

        Raises:
            EOFError, TimeoutError: It has ended, or has written none.
            Exception: What `host.raise_if_cancelled` raises.
        """
        end = time.monotonic() + seconds + GRACE_SECONDS
        while time.monotonic() < end:
            host.raise_if_cancelled()
            try:
                line = self._lines.get(timeout=WAIT_INTERVAL_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                raise EOFError
            return line
        raise TimeoutError

    def end(self) -> int:
        """Ends the process. Returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may be ending by itself
            process.wait(1)
        end_process(process)
        return process.returncode


def _read_lines(process: Any, lines: "queue.SimpleQueue[dict | None]"):
    """Hands on what a process writes, of which other programs may have written parts; last None."""
    for text in process.stdout:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.put(line)
    lines.put(None)
