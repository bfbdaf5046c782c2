"""What happens while a compiler works: a load waits for it, a user cancels, a process ends."""
import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import psutil
import pytest
import torch
from pack_api import (
    FORMATS,
    cpp_backend,
    product,  # noqa: F401
)
from user_kernels import forget_decisions, put_back_host, verdicts_on

from featherweight.nodes import FeatherweightExtension
from featherweight.ops import kernels
from featherweight.ops.kernels import waiting
from featherweight.ops.kernels.verdicts import Verdicts
from featherweight.ops.layers import fast_on_cpu  # noqa: F401

CPU = torch.device("cpu")
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
PACK = Path(__file__).parents[3]
LONG = 300  # seconds: more than anything takes on any machine
# Texts of the sources that a compiler is to hold back.
DEQUANTIZE_OF_Q4_K = ("FORMAT Q4_K", "void dequantize(")

pytestmark = pytest.mark.skipif(COMMAND is None or sys.platform == "win32",
                                reason="needs a C++ compiler")


class HeldCompiler:
    """A compiler that holds back the sources that contain all of some texts until `release`, or
    fails after `end`."""

    def __init__(self, folder: Path):
        self.command = folder / "compiler"
        self.started = folder / "started"
        self._go = folder / "go"
        self._end = folder / "end"

    def hold(self, *alternatives: tuple[str, ...]):
        has_all = " || ".join(" && ".join(["true", *(
            f"grep -qF '{text}' \"$file\"" for text in texts)]) for texts in alternatives)
        self.command.write_text(
            f'#!/bin/sh\nfor file; do case "$file" in *.cpp) if {has_all}; then\n'
            f'echo $$ >> {self.started}; until [ -e {self._go} ]; do [ -e {self._end} ] && exit 1;'
            f' sleep 0.05; done\nfi;; esac; done\nexec {COMMAND} "$@"\n')
        self.command.chmod(0o755)

    def release(self):
        self._go.touch()

    def end(self):
        self._end.touch()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """The kernel layer as when ComfyUI starts, with a `HeldCompiler`."""
    compiler = HeldCompiler(tmp_path)
    monkeypatch.setenv(kernels.VARIABLE, "cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler.command))
    forget_decisions(monkeypatch)
    cpp_backend._kernels.cache_clear()
    yield compiler
    compiler.end()
    for thread in list(waiting._threads):
        thread.join(LONG)
    cpp_backend._kernels.cache_clear()


def needed(*names: str, capabilities=("dequantize", "linear")) -> list:
    return [(capability, FORMATS[name], torch.float32)
            for name in names for capability in capabilities]


def test_kernels_are_compiled_side_by_side(compiler):
    compiler.hold(("FORMAT Q4_K",), ("FORMAT Q6_K",))
    thread = threading.Thread(target=kernels.decide, args=(CPU, needed("Q4_K", "Q6_K")))
    thread.start()
    end = time.monotonic() + LONG
    while not compiler.started.exists() or len(compiler.started.read_text().split()) < 2:
        assert time.monotonic() < end and thread.is_alive()
        time.sleep(0.05)
    compiler.release()
    thread.join(LONG)
    assert verdicts_on(CPU).count("right") == 6


@pytest.mark.parametrize("capability", [
    "dequantize", pytest.param("pack_blocks", marks=pytest.mark.heavy)])
def test_a_cancel_ends_the_wait_for_a_compiler_and_the_next_load_asks_again(
        capability, compiler, monkeypatch):
    put_back_host(monkeypatch)
    asyncio.run(FeatherweightExtension().on_load())
    compiler.hold(("nothing",))
    kernels.decide(CPU, needed("Q8_0"))
    compiler.hold((f"void {capability}(",))
    user = threading.Timer(0.5, comfy.model_management.interrupt_current_processing)
    user.start()
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            kernels.decide(CPU, needed("Q4_K", capabilities=[capability]))
    finally:
        user.join()
        comfy.model_management.interrupt_current_processing(False)
    compiler.release()
    kernels.decide(CPU, needed("Q4_K", capabilities=[capability]))
    assert kernels.find(capability, CPU, FORMATS["Q4_K"], torch.float32) is not None


ENDS = f"""
import sys, time, types
from pathlib import Path
pack = types.ModuleType("featherweight")
pack.__path__ = [{str(PACK)!r}]
sys.modules["featherweight"] = pack
import torch
from featherweight.ops import formats, kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels.waiting import start_thread
needed = [("dequantize", FORMATS["Q4_K"], torch.float32)]
def products():
    end = time.monotonic() + 1
    while time.monotonic() < end:
        torch.ones(100, 100) @ torch.ones(100, 100)
start_thread(lambda: kernels.decide(torch.device("cpu"), needed), 'decides')
while not Path(sys.argv[1]).is_file():
    time.sleep(0.05)
start_thread(products, 'products')
time.sleep(0.1)
"""


@pytest.mark.parametrize("held", [(), DEQUANTIZE_OF_Q4_K], ids=["the first", "Q4_K"])
def test_a_process_ends_without_error_while_it_compiles_and_leaves_nothing(
        held, compiler, tmp_path):
    """No compiler runs on, and nothing is stored against a kernel."""
    compiler.hold(held)
    subprocess.run([sys.executable, "-c", ENDS, str(compiler.started)], check=True, timeout=LONG)
    (group,) = set(compiler.started.read_text().split())
    end = time.monotonic() + LONG
    while any(os.getpgid(process.pid) == int(group) for process in running()):
        assert time.monotonic() < end, "a compiler runs on"
        time.sleep(0.05)
    for file in (tmp_path / "cache/featherweight/verdicts").glob("*.jsonl"):
        assert {line["verdict"] for line in Verdicts(file)._lines() if "name" in line} <= {"right"}


@pytest.mark.parametrize(("span", "is_killed"), [
    pytest.param(span, is_killed, marks=() if span == (0.5, 2) and is_killed else pytest.mark.heavy)
    for span in ((0, 0.5), (0.5, 2), (2, 6)) for is_killed in (True, False)], ids=str)  # seconds
def test_comfyui_that_is_closed_in_its_first_seconds_has_every_kernel_at_the_next_start(
        span, is_killed, compiler, monkeypatch):
    compiler.hold(("nothing",))
    end = "os.kill(os.getpid(), 9)" if is_killed else "sys.exit()"
    closes = f"import os\ntime.sleep({random.uniform(*span)})\n{end}"
    script = ENDS.partition("while not")[0] + closes
    subprocess.run([sys.executable, "-c", script, str(compiler.started)], timeout=LONG)
    kernels.decide(CPU, needed("Q4_K", "Q6_K"))
    assert set(verdicts_on(CPU)) == {"right"}
    for case in needed("Q4_K", "Q6_K"):
        assert kernels.used(CPU, [case[1]], case[2], case[0]) == kernels.TITLES["cpp"]


def running() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid):
                yield process
