"""What the device is, whether the kernels are right on it, and the tests of them."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

import devtools.measure  # noqa: F401  the host
import comfy.model_management
import torch

from devtools import ROOT
from devtools.measure.bench.timing import device, side_by_side

TESTS = ["tests/ops/test_kernels.py", "tests/ops/test_kernels_triton.py", "tests/ops/test_kernels_nvrtc.py",
         "tests/ops/test_formats.py"]


def describe(options):
    """Its name and what is installed; bytes it copies and products it makes a second."""
    place = device()
    found = {"name": f"{comfy.model_management.get_torch_device_name(place)}, torch {torch.__version__}"}
    if place.type == "cuda":
        found |= {"driver": _driver(), "capability": "{}.{}".format(*torch.cuda.get_device_capability(place)),
                  "Triton": _version("triton"), "memory": comfy.model_management.get_total_memory(place)}
    yield "device", found
    size = 1 << (20 if options.quick else 28)
    here, elsewhere = torch.empty(size, dtype=torch.uint8, device=place), torch.empty(size, dtype=torch.uint8, device=place)
    kept = torch.empty(size, dtype=torch.uint8, pin_memory=place.type == "cuda")
    mapped = torch.empty(size, dtype=torch.uint8)
    times = side_by_side({"pinned memory to it": lambda: here.copy_(kept, non_blocking=True),
                          "other memory to it": lambda: here.copy_(mapped),
                          "within it": lambda: elsewhere.copy_(here)}, options.rounds)
    yield "copying", {f"GB a second, {name}": size / 1e9 / taken["median"] for name, taken in times.items()}
    side = 256 if options.quick else 8192
    for dtype in (torch.bfloat16, torch.float16):
        left = torch.randn(side, side, dtype=dtype, device=place)
        taken = side_by_side({"product": lambda left=left: left @ left}, options.rounds)["product"]["median"]
        yield f"{side} squared, {str(dtype).removeprefix('torch.')}", {"TFLOP a second": 2 * side ** 3 / taken / 1e12}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(query, capture_output=True, text=True).stdout.split() or ["unknown"])[0]


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "none"
    return importlib.import_module(package).__version__


def run_tests(options):
    """Of each file how many tests passed, failed and were skipped, and the names of those that failed."""
    for file in TESTS[:1] if options.quick else TESTS:
        with tempfile.TemporaryDirectory() as folder:
            heavy = [] if options.quick else ["--heavy"]
            subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={folder}/tests.xml",
                            *heavy, file], cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""})
            yield file, outcomes(Path(folder) / "tests.xml")


def outcomes(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {"passed": "none", "failed": "pytest ended, see log.txt"}
    suite = xml.etree.ElementTree.parse(path).find(".//testsuite")
    failed = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    skipped = int(suite.get("skipped"))
    return {"passed": str(int(suite.get("tests")) - len(failed) - skipped), "skipped": str(skipped),
            "failed": f"{len(failed)}" + (f": {re.sub('[|]', '/', ', '.join(failed[:20]))}" if failed else "")}
