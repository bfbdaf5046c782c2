"""Kernels are compiled while torch works: nobody waits for a compiler for long, and a picture stays the same meanwhile."""
import asyncio
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
from featherweight.nodes import FeatherweightExtension
from featherweight.ops import formats, int8, kernels, product  # noqa: F401
from featherweight.ops.format import FORMATS
from featherweight import child_process
from featherweight.ops.kernels import background, cpp_backend, selector
from featherweight.ops.kernels.check import random_tensors
from featherweight.ops.tensor import packed_tensor
from patched_models import packed_flux, run

CPU = torch.device("cpu")
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
PACK = Path(__file__).parents[2]
FOREVER = 1000  # seconds
KERNELS = "featherweight-kernels"  # name of the threads that use a compiler

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32", reason="needs a C++ compiler")


def wait_for_kernels(meanwhile=lambda: None):
    """Until no thread finds out about kernels: it would remember its own compiler in the midst of the next test."""
    while any(thread.name == KERNELS for thread in threading.enumerate()):  # one that ends may let another begin
        meanwhile()
        time.sleep(0.05)


def kill_compilers():
    for process in list(child_process._running):
        child_process._kill(process)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(seconds, of): the kernel layer as at the start, and a compiler that sleeps before it compiles a source that has
    the text `of`."""
    wait_for_kernels()
    monkeypatch.setenv(kernels.VARIABLE, "cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = tmp_path / "compiler"
    monkeypatch.setenv("CXX", str(command))

    def compiler(seconds, of="."):
        command.write_text(f'#!/bin/sh\nfor file; do case "$file" in *.cpp) if grep -q "{of}" "$file"; then\n'
                           f'echo $$ >> {tmp_path}/started; sleep {seconds}\nfi;; esac; done\nexec {COMMAND} "$@"\n')
        command.chmod(0o755)
        monkeypatch.setattr(kernels, "_selectors", {})
        cpp_backend._kernels.cache_clear()

    yield compiler
    wait_for_kernels(meanwhile=kill_compilers)
    cpp_backend._kernels.cache_clear()


def patience(monkeypatch, seconds: float):
    """How long a call waits for a kernel that differs from torch by rounding."""
    monkeypatch.setattr(selector, "WAIT_SECONDS", dict.fromkeys(selector.WAIT_SECONDS, seconds) | {selector.EXACT: 0})


def weight(name="Q4_K", rows=16, columns=512):
    packed_format = FORMATS[name]
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, CPU, calm=True)
    return packed_tensor(packed_format, tensors[0], (rows, columns))


def product_of(name="Q4_K", tokens=3):
    input = torch.randn((tokens, 512), generator=torch.Generator().manual_seed(0))
    return product.linear(input, weight(name))


def seconds_of(operation) -> float:
    started = time.monotonic()
    operation()
    return time.monotonic() - started


def test_unpacking_waits_for_no_compiler(compiler):
    compiler(FOREVER)
    assert seconds_of(lambda: product.unpack(weight(), torch.float32)) < 1
    assert torch.equal(product.unpack(weight(), torch.float32), weight().dequantize())


@pytest.mark.parametrize("hangs_on", [".", "FORMAT Q4_K"], ids=["the first source", "a kernel"])
def test_a_product_waits_for_its_kernel_as_long_as_it_may_and_only_once(hangs_on, compiler, monkeypatch, caplog):
    compiler(FOREVER, hangs_on)
    patience(monkeypatch, 0.7 if hangs_on == "." else 4)
    assert seconds_of(product_of) < selector.WAIT_SECONDS["linear"] * 2 + 1
    assert seconds_of(product_of) < 0.5
    assert torch.equal(product_of(), torch.nn.functional.linear(
        torch.randn((3, 512), generator=torch.Generator().manual_seed(0)), weight().dequantize()))
    (warning,) = [record.message for record in caplog.records if "[Featherweight] No kernel was ready" in record.message]
    assert "until ComfyUI starts again" in warning


def test_a_compiler_that_hangs_on_one_format_holds_up_no_other(compiler, monkeypatch):
    compiler(FOREVER, "FORMAT Q4_K")
    patience(monkeypatch, 30)
    held_up = threading.Thread(target=product_of, daemon=True, name=KERNELS)
    held_up.start()
    assert seconds_of(lambda: product_of("Q8_0")) < 15
    assert kernels.find("linear", CPU, FORMATS["Q8_0"], torch.float32, tokens=3) is not None
    assert seconds_of(lambda: product.unpack(weight("Q6_K"), torch.float32)) < 1
    assert held_up.is_alive()


def test_who_cancels_does_not_wait_for_the_compiler(compiler, monkeypatch):
    monkeypatch.setattr(background, "raise_if_cancelled", background.raise_if_cancelled)  # put back after the test
    asyncio.run(FeatherweightExtension().on_load())
    compiler(FOREVER)
    patience(monkeypatch, 60)
    user = threading.Timer(0.5, comfy.model_management.interrupt_current_processing)
    user.start()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            product_of()
    finally:
        user.join()
        comfy.model_management.interrupt_current_processing(False)
    assert seconds_of(lambda: product.unpack(weight(), torch.float32)) < 1


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("seconds", [0.3, 60], ids=["the kernel comes too late", "the kernel comes in time"])
def test_the_same_product_has_the_same_bits_whenever_its_kernels_come(tokens, seconds, compiler, monkeypatch):
    compiler(1, "FORMAT Q4_K")
    patience(monkeypatch, 60)
    assert kernels.backend_of(CPU) == "cpp"
    patience(monkeypatch, seconds)
    results = [product_of("Q4_K", tokens)]
    end = time.monotonic() + 60
    while kernels.find("unpack", CPU, FORMATS["Q4_K"], torch.float32) is None and time.monotonic() < end:
        results.append(product_of("Q4_K", tokens))
        time.sleep(0.02)
    results += [product_of("Q4_K", tokens) for _ in range(3)]
    assert len(results) > 6 and all(torch.equal(result, results[0]) for result in results)
    in_time = seconds > 1
    assert (kernels.find("linear", CPU, FORMATS["Q4_K"], torch.float32, tokens=3) is not None) == in_time


def test_a_kernel_that_was_not_waited_for_is_used_when_it_comes(compiler):
    compiler(0.5)
    found = []
    end = time.monotonic() + 60
    while time.monotonic() < end and not (found and found[-1]):
        found.append(kernels.find("unpack", CPU, FORMATS["Q4_K"], torch.float32) is not None)
        time.sleep(0.02)
    assert found[0] is False and found[-1] is True


@pytest.mark.usefixtures("small_models")
def test_a_model_gives_the_same_values_before_and_after_its_kernels_come(compiler):
    compiler(0.5)
    patcher = packed_flux("Q4_K")
    results, end = [run(patcher)], time.monotonic() + 60
    while kernels.find("unpack", CPU, FORMATS["Q4_K"], torch.float32) is None and time.monotonic() < end:
        results.append(run(patcher))
    results += [run(patcher) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)


PROCESS = f"""
import sys, time, types
from pathlib import Path
sys.path.insert(0, {str(Path(comfy.model_management.__file__).parents[1])!r})
sys.argv[1:] = []
pack = types.ModuleType("featherweight")
pack.__path__ = [{str(PACK)!r}]
sys.modules["featherweight"] = pack
import torch
"""
ENDS_WITH_A_COMPILER = PROCESS + """
from featherweight.ops import formats, kernels
from featherweight.ops.format import FORMATS
kernels.find("unpack", torch.device("cpu"), FORMATS["Q4_K"], torch.float32)
while not Path({started!r}).is_file():
    time.sleep(0.05)
"""
ENDS_WITHIN_TORCH = PROCESS + """
from featherweight.ops.kernels.background import WriteOnceFuture
def products():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.ones(100, 100) @ torch.ones(100, 100)
WriteOnceFuture(products)
time.sleep(0.1)
"""


def ends(script: str):
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_process_ends_without_error_while_a_thread_is_within_torch():
    ends(ENDS_WITHIN_TORCH)


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_no_compiler_stays_when_the_process_ends(compiler, tmp_path):
    compiler(FOREVER)
    started = tmp_path / "started"
    assert seconds_of(lambda: ends(ENDS_WITH_A_COMPILER.format(started=str(started)))) < 60
    (group,) = started.read_text().split()
    time.sleep(0.2)
    processes_here = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    alive = [line for line in processes_here.splitlines() if line.split()[0] == group and "Z" not in line]
    assert not alive
    assert not [path for path in (tmp_path / "cache/featherweight/kernels").iterdir()]
