"""Kernels are compiled while torch works: no call waits for a compiler, pictures stay the same."""
import asyncio
import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfy.model_management
import pytest
import torch
from patched_models import flux_file, packed_flux, run

from featherweight.nodes import FeatherweightExtension
from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels import background, cpp_backend, selector
from featherweight.ops.kernels.validation import random_tensors
from featherweight.ops.kernels.verdicts import Verdicts
from featherweight.ops.layers import int8, product  # noqa: F401
from featherweight.ops.tensor.packed_layout import packed_tensor

CPU = torch.device("cpu")
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
PACK = Path(__file__).parents[3]
LONG = 300  # seconds: more than anything takes on any machine
KERNELS = "featherweight-kernels"  # name of the threads that use a compiler
# Texts of the sources that a compiler is to hold back.
FIRST_SOURCE = ()
OF_Q4_K = ("FORMAT Q4_K",)
DEQUANTIZE_OF_Q4_K = ("FORMAT Q4_K", "void dequantize(")

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32",
                                reason="needs a C++ compiler")


def wait_for_kernels():
    """Waits for the thread that validates kernels: it would cache its compiler during the next
    test."""
    done = threading.Event()
    background.submit(done.set)
    assert done.wait(LONG)


class HeldCompiler:
    """A compiler that holds back the sources that contain all of some texts until `release`, or
    fails after `end`."""

    def __init__(self, folder: Path):
        self.command = folder / "compiler"
        self.started = folder / "started"
        self._go = folder / "go"
        self._end = folder / "end"

    def hold(self, texts: tuple[str, ...]):
        has_all = " && ".join(["true", *(f"grep -qF '{text}' \"$file\"" for text in texts)])
        self.command.write_text(
            f'#!/bin/sh\nfor file; do case "$file" in *.cpp) if {has_all}; then\n'
            f'echo $$ >> {self.started}; until [ -e {self._go} ]; do [ -e {self._end} ] && exit 1;'
            f' sleep 0.05; done\nfi;; esac; done\nexec {COMMAND} "$@"\n')
        self.command.chmod(0o755)

    def release(self):
        self._go.touch()

    def end(self):
        self._end.touch()


@pytest.fixture(scope="module", autouse=True)
def packed_by_torch():
    """Packs the model's file, which other files' tests use too, by torch instead of by a kernel."""
    flux_file("Q4_K")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The kernel layer as when ComfyUI starts, with a `HeldCompiler`."""
    wait_for_kernels()
    compiler = HeldCompiler(tmp_path)
    monkeypatch.setenv(kernels.VARIABLE, "cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler.command))
    monkeypatch.setattr(kernels, "_selectors", {})
    cpp_backend._kernels.cache_clear()
    yield compiler
    compiler.end()
    wait_for_kernels()
    cpp_backend._kernels.cache_clear()


def weight(name="Q4_K", rows=16, columns=512):
    packed_format = FORMATS[name]
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, CPU,
                             bounded=True)
    return packed_tensor(packed_format, tensors[0], (rows, columns))


def product_of(name="Q4_K", tokens=3):
    input = torch.randn((tokens, 512), generator=torch.Generator().manual_seed(0))
    return product.linear(input, weight(name))


def seconds_of(operation) -> float:
    started = time.monotonic()
    operation()
    return time.monotonic() - started


def dequantize_kernel():
    return kernels.find("dequantize", CPU, FORMATS["Q4_K"], torch.float32)


def test_no_call_waits_for_a_compiler(compiler):
    compiler.hold(FIRST_SOURCE)
    assert seconds_of(lambda: product.dequantize(weight(), torch.float32)) < LONG
    assert torch.equal(product.dequantize(weight(), torch.float32), weight().dequantize())
    assert seconds_of(product_of) < LONG


def test_many_formats_are_validated_by_one_thread(compiler):
    compiler.hold(FIRST_SOURCE)
    before = threading.active_count()
    for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "NF4"):
        kernels.find("dequantize", CPU, FORMATS[name], torch.float32)
    assert threading.active_count() <= before + 1


def test_a_cancel_ends_the_wait_for_a_kernel_that_quantizes(compiler, monkeypatch):
    # put back after the test
    monkeypatch.setattr(background, "raise_if_cancelled", background.raise_if_cancelled)
    asyncio.run(FeatherweightExtension().on_load())
    kernels.find("dequantize", CPU, FORMATS["Q4_K"], torch.float32)
    wait_for_kernels()
    compiler.hold(("pack_blocks",))
    monkeypatch.setattr(selector, "WAIT_SECONDS", LONG)
    user = threading.Timer(0.5, comfy.model_management.interrupt_current_processing)
    user.start()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            kernels.find("pack_blocks", CPU, FORMATS["Q4_K"], torch.float32)
    finally:
        user.join()
        comfy.model_management.interrupt_current_processing(False)


def results_until_the_kernel_comes(compiler, compute) -> list[torch.Tensor]:
    """Returns some results from before the kernel comes, and some from after."""
    assert dequantize_kernel() is None
    results = [compute() for _ in range(2)]
    compiler.release()
    end = time.monotonic() + LONG
    while dequantize_kernel() is None:
        assert time.monotonic() < end
        results.append(compute())
    wait_for_kernels()  # products are proven too
    return results + [compute() for _ in range(3)]


@pytest.mark.usefixtures("small_models")
def test_a_model_gives_the_same_values_before_and_after_its_kernels_come(compiler):
    compiler.hold(DEQUANTIZE_OF_Q4_K)
    patcher = packed_flux("Q4_K")
    first, *others = results_until_the_kernel_comes(compiler, lambda: run(patcher))
    assert all(torch.equal(result, first) for result in others)
    find = functools.partial(kernels.find, "linear", CPU, FORMATS["Q4_K"], torch.float32, 1)
    assert find() is not None
    loads = {layer.load for layer in patcher.model.modules() if hasattr(layer, "load")}
    assert all(find(load) is None for load in loads)
    again = packed_flux("Q4_K")  # loaded again
    loads = {layer.load for layer in again.model.modules() if hasattr(layer, "load")}
    assert all(find(load) is not None for load in loads)


ENDS = f"""
import sys, time, types
from pathlib import Path
pack = types.ModuleType("featherweight")
pack.__path__ = [{str(PACK)!r}]
sys.modules["featherweight"] = pack
import torch
from featherweight.ops import formats, kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels.background import start_thread
def products():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.ones(100, 100) @ torch.ones(100, 100)
while not Path(sys.argv[1]).is_file():
    kernels.find("dequantize", torch.device("cpu"), FORMATS["Q4_K"], torch.float32)
    time.sleep(0.05)
start_thread(products, 'products')
time.sleep(0.1)
"""


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_a_process_ends_without_error_within_torch_and_no_compiler_stays(compiler, tmp_path):
    compiler.hold(FIRST_SOURCE)
    subprocess.run([sys.executable, "-c", ENDS, str(compiler.started)], check=True, timeout=LONG)
    (group,) = compiler.started.read_text().split()
    end = time.monotonic() + LONG
    while any(line.split()[0] == group and "Z" not in line for line in processes()):
        assert time.monotonic() < end, "a compiler runs on"
        time.sleep(0.05)
    assert not list((tmp_path / "cache/featherweight/kernels").iterdir())


def test_a_process_that_ends_while_it_compiles_stores_nothing_against_a_kernel(compiler, tmp_path):
    compiler.hold(DEQUANTIZE_OF_Q4_K)
    subprocess.run([sys.executable, "-c", ENDS, str(compiler.started)], check=True, timeout=LONG)
    (file,) = (tmp_path / "cache/featherweight/verdicts").glob("*.jsonl")
    assert {line["verdict"] for line in Verdicts(file)._lines() if "name" in line} <= {"stopped",
                                                                                      "right"}


def processes() -> list[str]:
    """Returns the group and the state of every process on this machine."""
    return subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True,
                          check=True).stdout.splitlines()
