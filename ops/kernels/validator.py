"""Validates kernels in another process, so that a crash or hang of one harms nothing else."""
import json
import math
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from ...child_process import end_process, is_ending, start_process
from ..formats._names import formats_of_key
from ..log import log
from .background import start_thread
from .kernel import Case, Kernel, WrongResult, device_name
from .private_files import cache_folder, private_folder
from .validation import ISSUES, check
from .verdicts import is_verdict

if TYPE_CHECKING:
    from .selector import Selector

FREE_TO_BEGIN = 1_500_000_000  # bytes of the device
TOO_LITTLE_MEMORY = f"less than {FREE_TO_BEGIN / 1e9:.1f} GB of its memory was free"
JOB_SECONDS = 900
KERNEL_SECONDS = 120  # to be compiled, checked and timed
MAX_RESTARTS = 3
WITHOUT_MEMORY = 3  # exit status
# Signals that no kernel sends. A system without memory kills what takes much of it.
FOREIGN_SIGNALS = {getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGHUP")
                   if hasattr(signal, name)}

PACK = Path(__file__).parents[2]
# The pack's folder may have any name, an embedded Python looks for modules only in its own folders,
# and the working directory may contain anything. The launcher must not import torch, as the
# packages that its module is in do.
START = ("import sys, types; sys.path[:] = filter(None, sys.path);"
         " parts = [('', ''), ('.ops', '/ops'), ('.ops.kernels', '/ops/kernels')];"
         " stubs = parts if {is_light} else parts[:1];"
         " [setattr(sys.modules.setdefault('featherweight' + name,"
         " types.ModuleType('featherweight' + name)), '__path__', [sys.argv[1] + path])"
         " for name, path in stubs];"
         " import featherweight.ops.kernels.{module} as module; module.main()")


def command_of(module: str, is_light: bool = False) -> tuple[str, ...]:
    """Returns the command that runs `main` of a module of this folder.

    Args:
        module: Its name.
        is_light: Whether the packages that it is in are not run.
    """
    return sys.executable, "-c", START.format(module=module, is_light=is_light), str(PACK)


COMMAND = command_of("validation_process")


def validate_kernel(kernel: Kernel, case: Case, device: torch.device) -> dict:
    """Compares a kernel with the reference on a device, in all that a layer may need of it.

    Returns:
        "verdict" as in `RETRY_AFTER_S` of `verdicts`, and "why".
    """
    try:
        packed_format = None if case.layout is None else formats_of_key(case.layout)[0]
        check(kernel, packed_format, case.dtype, device)
    except WrongResult as error:
        return {"verdict": "wrong", "why": str(error)}
    except (torch.OutOfMemoryError, subprocess.TimeoutExpired) as error:  # of a compiler
        return {"verdict": "stopped", "why": str(error)[:500]}
    except Exception as error:  # a compiler or driver may raise anything
        return {"verdict": "refused", "why": repr(error)[:500]}
    return {"verdict": "right"}


def free_bytes(device: torch.device) -> float:
    """Returns the free memory of a GPU; infinity for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return math.inf


class ProcessValidator:
    """Validates kernels of all GPUs, one after another, in processes of `validation_process`.

    Args:
        command: That runs it.
        kernel_seconds: How long a kernel may take.
    """

    def __init__(self, command: tuple[str, ...] = COMMAND, kernel_seconds: float = KERNEL_SECONDS):
        self._kernel_seconds = kernel_seconds
        self._requests: queue.SimpleQueue[tuple[Selector, list[Case]]] = queue.SimpleQueue()
        self._process = start_process(
            *command_of("validation_launcher", is_light=True), *command, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        start_thread(self._run, "featherweight-validation")

    def request(self, selector: "Selector", cases: list[Case]):
        """Has the kernels for some cases validated, after those requested before."""
        self._requests.put((selector, cases))

    def end(self):
        """Ends the processes."""
        end_process(self._process)

    def _run(self):
        while not is_ending():
            try:
                selector, cases = self._requests.get(timeout=1)
            except queue.Empty:
                continue
            try:
                self.validate(selector, cases)
            except Exception:  # a drive or driver may raise anything
                if is_ending() or self._process.poll() is not None:
                    return
                log.warning("Kernels are not validated on %s: torch does their"
                            " work.", selector.device, exc_info=True)

    def validate(self, selector: "Selector", cases: list[Case]):
        """Validates the kernels of some cases, and goes on after one that ended the process."""
        if not selector.wait_until_read() or selector.path is None:
            return
        device, before = selector.device, selector.summary()
        # another ComfyUI of this user may be validating
        with FileLock(private_folder(cache_folder() / "verdicts") / "lock"):
            cases = selector.missing(cases)
            if not cases:
                return
            if free_bytes(device) < FREE_TO_BEGIN:
                self._log(selector, before, TOO_LITTLE_MEMORY)
                return
            log.info("Kernels for packed weights are validated on %s in the"
                     " background.", device_name(device))
            status, reason = 0, ""
            for _ in range(1 + MAX_RESTARTS):
                status, culprit = self._run_job(selector, cases)
                if culprit is None:
                    break
                verdict = "crashed"
                if time.time() - culprit["at"] >= self._kernel_seconds:
                    verdict = "hung"
                elif -status in FOREIGN_SIGNALS or is_ending():
                    verdict = "stopped"
                selector.add(culprit["name"], verdict, why=f"its process ended with {status}")
                if is_ending():
                    return
            else:
                reason = f"{MAX_RESTARTS + 1} kernels ended their process"
        if status == WITHOUT_MEMORY:
            reason = TOO_LITTLE_MEMORY
        elif status and not reason:
            reason = f"its process ended with {status}"
        self._log(selector, before, reason)

    def _run_job(self, selector: "Selector", cases: list[Case]) -> tuple[int, dict | None]:
        """Runs a process to its end.

        Returns:
            Its exit status, and the line of the kernel that it was validating, None where none.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # they are pipes
        job = {"device": str(selector.device), "backend": selector.backend_name,
               "file": str(selector.path), "kernel_seconds": self._kernel_seconds,
               "seconds": JOB_SECONDS + self._kernel_seconds, "cases": list(map(str, cases))}
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        begun = None
        for text in stdout:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if is_verdict(line):
                begun = line if line["verdict"] == "begun" else None
                selector.take(line)
            elif isinstance(line, dict) and isinstance(line.get("ended"), int):
                return line["ended"], begun
        raise OSError("the process that starts the validation has ended")

    def _log(self, selector: "Selector", before: dict[str, list[str]], reason: str):
        """Logs what a job has found out, and why something is still without a verdict."""
        counts = {verdict: len(set(names) - set(before.get(verdict, ())))
                  for verdict, names in selector.summary().items()}
        parts = [f"{counts.get('right', 0)} kernels proven"]
        parts += [f"{count} {verdict}" for verdict, count in sorted(counts.items())
                  if count and verdict not in ("right", "begun", "stopped")]
        failed = [name for verdict in ("crashed", "hung")
                  for name in selector.summary().get(verdict, ())
                  if name not in before.get(verdict, ())]
        if failed:
            parts.append(f"please report this line at {ISSUES}: {'; '.join(failed)}")
        if reason:
            parts.append(f"{reason}, so the rest is validated when ComfyUI starts next")
        log.info("%s: %s.", device_name(selector.device), ", ".join(parts))
