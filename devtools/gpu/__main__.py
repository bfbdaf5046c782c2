"""python3 dev.py gpu: every stage in a process of its own, one after another; a crash or a hang
costs its stage only."""
import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

# the stages alone use the GPU: nothing of this process lies there
if __name__ == "__main__":
    os.environ["HOST_ARGUMENTS"] = "--cpu"

from devtools.measure.figures import Report

from devtools import ROOT
from devtools.gpu.goals import closing, goals
from devtools.gpu.stages import PARTS, ROW, STAGES
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
                        help="2: LoRAs, models larger than the memory, and ComfyUI's formats")
    parser.add_argument("--only", nargs="+", choices=STAGES)
    for used in ("--packed", "--kitchen"):  # by `dev.py`
        parser.add_argument(used, help=argparse.SUPPRESS)
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
                    closing=functools.partial(closing, is_judged=not quick))
    if options.part == 1:  # all kernels are decided anew, once for all stages of both commands
        shutil.rmtree(options.out / "cache", ignore_errors=True)
    for name in options.only or PARTS[options.part]:
        stage = STAGES[name]
        # a rehearsal shares its processor with others: 13 s became 61
        left = min(stage.seconds * (4 if on_a_cpu else 1), end - time.monotonic())
        if left < 1:
            continue
        report.begin(name, stage.about)
        started = time.monotonic()
        how = _run([name, *quick], "--cpu" if on_a_cpu else stage.arguments, left,
                   functools.partial(_add, report, name), options.out / "log.txt")
        report.end(name, f"{how} after {time.monotonic() - started:.0f} s")
        print(f"  {report.figures[name]['ended']}", flush=True)
    for what, wanted, found, verdict in () if quick else goals(report.figures):
        print(f"{wanted:8s} {found:8s} {verdict:12s} {what}")
    report.draw()
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _add(report: Report, stage: str, title: str, values: dict):
    if stage == "device" and "name" in values:
        report.figures["machine"] = values["name"]
    report.add(stage, title, values)


def _run(arguments: list[str], host_arguments: str, seconds: float, show, log: Path) -> str:
    """Run a stage and show its rows as they come; how it ended. What else it prints goes into the
    log."""
    variables = {**os.environ, "HOST_ARGUMENTS": host_arguments, "PYTHONUNBUFFERED": "1",
                 "XDG_CACHE_HOME": str(log.parent / "cache")}
    child = start_process(sys.executable, "-m", "devtools.gpu.stages", *arguments, cwd=ROOT,
                          text=True, bufsize=1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=variables)
    assert child.stdout is not None
    stopped = threading.Event()

    def stop():
        stopped.set()
        end_process(child)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n=== {' '.join(arguments)} ===\n")
            for text in child.stdout:
                if text.startswith(ROW):
                    show(*json.loads(text.removeprefix(ROW)))
                else:
                    file.write(text)
        code = child.wait()
    finally:
        timer.cancel()
        end_process(child)
    if stopped.is_set():
        return "stopped"
    return f"ended with {code}, see log.txt," if code else "done"


if __name__ == "__main__":
    sys.exit(main())
