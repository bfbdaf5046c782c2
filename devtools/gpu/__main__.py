"""python3 dev.py gpu: stages one after another. Those that take the same ComfyUI share a process; a
crash or a hang costs its stage only."""
import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# the stages alone use the GPU: nothing of this process lies there
if __name__ == "__main__":
    os.environ["HOST_ARGUMENTS"] = "--cpu"

from devtools.measure.figures import Report

from devtools import ROOT
from devtools.gpu.goals import closing, goals
from devtools.gpu.stages import END, PARTS, ROW, STAGES, Stage
from featherweight.child_process import end_process, start_process

LAST = 5  # seconds kept for the picture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 dev.py gpu",
                                     description="Everything that only a GPU can show.")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu",
                        help="cpu: rehearse every stage at a tiny size")
    parser.add_argument("--quick", action="store_true",
                        help="every stage at a tiny size, on the GPU too")
    parser.add_argument("--minutes", type=float, default=9,
                        help="after which the run ends, whatever is left to do")
    parser.add_argument("--part", type=int, choices=PARTS, default=1,
                        help="2: layers, models larger than the memory, and tests")
    parser.add_argument("--only", nargs="+", choices=STAGES)
    parser.add_argument("--packed", help=argparse.SUPPRESS)  # used by `dev.py`
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "gpu",
                        help="folder for gpu.json, gpu.md and gpu.png")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes - LAST
    on_a_cpu = options.device == "cpu"
    if not on_a_cpu and not _has_gpu():
        print(
            "Failed: torch finds no GPU here. python3 dev.py gpu --device cpu rehearses the run on"
            " the CPU."
        )
        return 1
    quick = ["--quick"] if on_a_cpu or options.quick else []
    report = Report(options.out, "gpu" if options.part == 1 else f"gpu{options.part}",
                    closing=lambda figures: closing(figures, is_judged=not quick))
    if options.part == 1:  # all kernels are decided anew, once for all stages of both commands
        shutil.rmtree(options.out / "cache", ignore_errors=True)
    child = None
    names = list(options.only or PARTS[options.part])
    for index, name in enumerate(names):
        stage = STAGES[name]
        # a rehearsal shares its processor with others: 13 s became 61
        left = min(stage.seconds * (4 if on_a_cpu else 1), end - time.monotonic())
        if left < 1:
            break
        report.begin(name, stage.about)
        started = time.monotonic()
        if child is None or child.needs(stage):
            if child is not None:
                child.end()
            alike = itertools.takewhile(
                lambda other, first=stage: not Child.differ(STAGES[other], first), names[index:])
            child = Child([*alike, *quick], "--cpu" if on_a_cpu else stage.arguments, stage,
                          options.out / "log.txt")
        how = child.run(left, lambda title, row, name=name: _add(report, name, title, row))
        if not child.is_running:
            child = None
        report.end(name, f"{how} after {time.monotonic() - started:.0f} s")
        print(f"  {report.figures[name]['ended']}", flush=True)
    if child is not None:
        child.end()
    for what, wanted, found, verdict in () if quick else goals(report.figures):
        print(f"{wanted:8s} {found:8s} {verdict:12s} {what}")
    report.draw()
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _add(report: Report, stage: str, title: str, values: dict):
    if "name" in values and title.endswith("device"):
        report.figures["machine"] = values["name"]
    report.add(stage, title, values)


class Child:
    """A process that runs stages one after another. What it prints beside rows goes into the log.

    Args:
        arguments: of `devtools.gpu.stages`.
        host_arguments: ComfyUI's.
        stage: the first.
        log: file that is added to.
    """

    def __init__(self, arguments: list[str], host_arguments: str, stage: Stage, log: Path):
        self.stage = stage
        self._log = open(log, "a", encoding="utf-8")  # noqa: SIM115  closed by `end`
        self._log.write(f"\n=== {' '.join(arguments)} ===\n")
        self._process = start_process(
            sys.executable, "-m", "devtools.gpu.stages", *arguments, cwd=ROOT, text=True, bufsize=1,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"FEATHERWEIGHT_KERNELS": "untried", **os.environ, "PYTHONUNBUFFERED": "1",
                 "HOST_ARGUMENTS": host_arguments,
                 "XDG_CACHE_HOME": str(log.parent / "cache")})
        self.is_running = True

    @staticmethod
    def differ(one: Stage, other: Stage) -> bool:
        """Returns whether two stages take processes of their own."""
        return (one.arguments, one.needs_host) != (other.arguments, other.needs_host)

    def needs(self, stage: Stage) -> bool:
        """Returns whether another process must run a stage."""
        return self.differ(self.stage, stage)

    def run(self, seconds: float, show: Callable[[str, dict], None]) -> str:
        """Shows the rows of the next stage as they come. Returns how it ended; where that was too
        late, or with the process, `is_running` is false."""
        assert self._process.stdout is not None
        stopped = threading.Event()

        def stop():
            stopped.set()
            end_process(self._process)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for text in self._process.stdout:
                if text.startswith(ROW):
                    show(*json.loads(text.removeprefix(ROW)))
                elif text.startswith(END):
                    return text.removeprefix(END).strip()
                else:
                    self._log.write(text)
        finally:
            timer.cancel()
        code = self._process.wait()
        self.end()
        return "stopped" if stopped.is_set() else f"ended with {code}, see log.txt,"

    def end(self):
        self.is_running = False
        end_process(self._process)
        self._log.close()


if __name__ == "__main__":
    sys.exit(main())
