"""Whether the kernels are right on the device and faster than torch, and their tests."""
import collections
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence

import devtools.measure  # noqa: F401  the host
from devtools.measure.timing import device
from devtools.measure.weights import FORMAT_NAMES

import torch

from devtools import ROOT
from featherweight.ops.kernels import BACKENDS, Case
from featherweight.ops.kernels.selector import Selector
from featherweight.ops.kernels.validator import ProcessValidator

# Files of tests, with options.
TESTS = [
    "tests/ops/kernels/test_selector.py", "tests/ops/kernels/test_backends.py -k gpu",
    "tests/ops/kernels/test_cuda_backend.py", "tests/ops/formats/test_formats.py"
]


def try_all(options):
    """Of each kernel the verdict, with its time as a share of torch's; then how many there are of
    each. The verdicts are those that the later stages use, and validate nothing themselves; what
    these ask for most comes first, for the stage may be stopped."""
    validator, known = ProcessValidator(), {}
    selector = Selector(device(), BACKENDS.get(device().type), validator, True)
    selector.wait_until_read()
    for cases in turns(options.formats, options.quick):
        thread = threading.Thread(target=validator.validate, args=(selector, cases))
        thread.start()
        is_alive = True
        while is_alive:
            thread.join(1)
            is_alive = thread.is_alive()
            before, known = known, selector.lines()
            for name in known.keys() - before.keys():
                yield name, in_words(known[name])
    validator.end()
    counts = collections.Counter(line["verdict"] for line in known.values())
    yield "in all", {name: str(count) for name, count in counts.items()} or {"kernels": "none"}


def turns(names: Sequence[str], quick: bool) -> list[list[Case]]:
    """What layers of some formats may ask for in bfloat16; in other dtypes; then of all other
    formats."""
    if quick:
        return [cases_of(names[:1], [torch.float32])]
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    return [cases_of(names, dtypes[:1]), cases_of(names, dtypes[1:]),
            cases_of([name for name in FORMAT_NAMES if name not in names], dtypes)]


def cases_of(names: Sequence[str], dtypes: list[torch.dtype]) -> list[Case]:
    """What layers of these formats may ask for."""
    return [Case(op, name, dtype) for dtype in dtypes for name in names
            for op in ("dequantize", "linear")]


def in_words(verdict: dict) -> dict[str, str]:
    seconds = verdict.get("seconds")
    shares = f"×{seconds[0] / seconds[1]:.2f}" if seconds else ""
    why = re.sub(r"[|\n]", " ", verdict.get("why", ""))[:200]
    return {"verdict": verdict["verdict"], "of torch's time": shares, "why": why}


def run_tests(options):
    """Of each file how many tests passed, failed and were skipped, and the names of those that
    failed."""
    heavy = [] if options.quick else ["--heavy"]
    for file in TESTS[:1] if options.quick else TESTS:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "-p",
                               "no:cacheprovider", *heavy, *file.split()], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env={**os.environ, "PYTEST_ADDOPTS": ""})
        print(done.stdout, flush=True)  # into the log
        lines = done.stdout.splitlines() or ["pytest ended"]
        failed = [line.partition(" - ")[0].rpartition("::")[2].replace("|", "/")
                  for line in lines if line.startswith(("FAILED ", "ERROR "))]
        yield file, {"tests": lines[-1], "failed": ", ".join(failed[:20]) or "none"}
