"""Whether the kernels are right on the device and faster than torch, and their tests."""
import collections
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import devtools.measure  # noqa: F401  the host
from devtools.measure.in_turn import time_in_turn
from devtools.measure.timing import device
from devtools.measure.weights import FORMAT_NAMES

import torch
from torch.utils.benchmark import timer

from devtools import ROOT
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS, dequantize_by_reference
from featherweight.ops.kernels import Case
from featherweight.ops.kernels.decider import Decision
from featherweight.ops.kernels.validation import random_tensors

VALUES = 3072 * 3072  # of a weight that is timed

# Files of tests, with options.
TESTS = [
    "tests/ops/kernels/test_decider.py", "tests/ops/kernels/test_backends.py -k gpu",
    "tests/ops/kernels/test_cuda_backend.py", "tests/ops/formats/test_formats.py"
]


def try_all(options):
    """Of each kernel the verdict, and of one that dequantises its time as a share of torch's; then
    how many there are of each. The verdicts are those that the later stages use; what these ask for
    most comes first, for the stage may be stopped."""
    decider = kernels._decider(device())
    for cases in turns(options.formats, options.quick):
        for case in cases:
            known = set(decider._lines)
            kernels.decide(device(), [(case.capability, FORMATS[str(case.layout)], case.dtype)])
            why = (decider.find(case) or Decision((), "open")).why
            for name in sorted(decider._lines.keys() - known):
                yield name, {"verdict": decider._lines[name]["verdict"],
                             "of torch's time": share_of_torch(case),
                             "why": re.sub(r"[|\n]", " ", why)[:200]}
    counts = collections.Counter(line["verdict"] for line in decider._lines.values())
    yield "in all", {verdict: str(n) for verdict, n in counts.items()} or {"kernels": "none"}


def share_of_torch(case: Case) -> str:
    """The time in which a kernel dequantises a weight, as a share of torch's."""
    packed_format = FORMATS[str(case.layout)]
    run = kernels.find(case.capability, device(), packed_format, case.dtype)
    if run is None or case.capability != "dequantize":
        return ""
    blocks = VALUES // packed_format.block_length
    tensors = random_tensors(packed_format, blocks, device(), bounded=True)
    values = torch.empty(blocks * packed_format.block_length, dtype=case.dtype, device=device())
    times = time_in_turn({
        "kernel": lambda: run(packed_format, tensors, values, 0),
        "torch": lambda: dequantize_by_reference(packed_format, tensors, values, 0)}, 6, timer)
    return f"×{min(times['kernel'][1:]) / min(times['torch'][1:]):.2f}"


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
    cases = [Case(op, name, dtype) for dtype in dtypes for name in names
             for op in ("dequantize", "linear")]
    return cases + [Case("int8_rows", name, torch.int8) for name in names
                    if torch.bfloat16 in dtypes]


def run_tests(options):
    """Of each file how many tests passed, failed and were skipped, and the names of those that
    failed."""
    heavy = [] if options.quick else ["--heavy"]
    for file in TESTS[:1] if options.quick else TESTS:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "-p",
                               "no:cacheprovider", *heavy, *file.split()], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env={**os.environ, "PYTEST_ADDOPTS": "",
                                                           kernels.VARIABLE: "torch"})
        print(done.stdout, flush=True)  # into the log
        lines = done.stdout.splitlines() or ["pytest ended"]
        failed = [line.partition(" - ")[0].rpartition("::")[2].replace("|", "/")
                  for line in lines if line.startswith(("FAILED ", "ERROR "))]
        yield file, {"tests": lines[-1], "failed": ", ".join(failed[:20]) or "none"}
