"""A trial takes nothing from what ComfyUI does, is not misled by what others do, and leaves nothing behind."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import planted_backends
import pytest
import torch
from featherweight.ops import formats, kernels  # noqa: F401
from featherweight.ops.kernels import cpp_backend, room, trial_process
from featherweight.ops.kernels.cpp_backend import CppCompiler
from featherweight.ops.kernels.trial_process import only_one, run_trial
from featherweight.ops.kernels.verdicts import Case

PACK = Path(__file__).parents[2]
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes and files end otherwise on Windows")
needs_a_compiler = pytest.mark.skipif(COMMAND is None, reason="needs a C++ compiler")


def run(backend: str, is_busy=lambda: False, attempt_seconds=60):
    """Outcome and verdicts of a planted backend's trial."""
    job = {"device": "cpu", "backends": [backend], "cases": [Case("unpack", "Q4_0", torch.float32, None).as_json()],
           "shapes": {"Q4_0": [[16, 256]]}, "known": {}, "least_free": 0}
    said = {}
    return run_trial(job, lambda name, text, verdict: said.update({text: verdict["verdict"]}), 300, is_busy,
                     command=planted_backends.COMMAND, attempt_seconds=attempt_seconds), said


def test_a_trial_stops_when_the_device_is_at_work(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv(planted_backends.LOG, str(log))
    outcome, said = run("loops", is_busy=log.exists)
    assert outcome.how == "stopped" and "unpack of Q4_0 to float32, rows 1 to any" not in said
    assert not is_alive(int(log.read_text().split()[0]))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_kernel_that_waits_for_the_processor_on_a_cpu_is_not_one_that_hangs(monkeypatch):
    """It sleeps for longer than it may work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outcome, said = run("sleeps", attempt_seconds=2)
    assert outcome.how == "ended" and said["unpack of Q4_0 to float32, rows 1 to any"] in ("right", "slower")


def test_a_cpu_says_how_much_memory_is_free_as_the_system_does(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "MEMORY", tmp_path / "meminfo")
    assert room.free_bytes(torch.device("cpu")) == float("inf")
    room.MEMORY.write_text("MemTotal:       24000000 kB\nMemFree:          100000 kB\nMemAvailable:   12000000 kB\n")
    assert room.free_bytes(torch.device("cpu")) == 12_000_000 * 1024


def test_the_lock_of_trials_is_gone_after_the_last_and_two_are_never_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(trial_process, "ASK_EVERY", 0.01)
    script = ("import os, sys, time, types\n"
              "pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]; sys.modules['featherweight'] = pack\n"
              "from featherweight.ops.kernels import trial_process\n"
              "trial_process.ASK_EVERY = 0.001\n"
              "for _ in range(40):\n"
              "    with trial_process.only_one() as alone:\n"
              "        assert alone\n"
              "        os.close(os.open('inside', os.O_CREAT | os.O_EXCL))\n"  # raises where another is inside
              "        time.sleep(0.002)\n"
              "        os.unlink('inside')\n")
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    others = [subprocess.Popen([sys.executable, "-c", script, str(PACK)], cwd=tmp_path, env=environment) for _ in range(2)]
    assert [other.wait(300) for other in others] == [0, 0]
    with only_one() as alone:
        assert alone and list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@needs_a_compiler
def test_what_a_compiler_that_was_killed_left_is_removed_later(tmp_path, monkeypatch):
    """Its own files are where the source is."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$TMPDIR" > {tmp_path}/told\nexec {COMMAND} "$@"\n')
    compiler.chmod(0o755)
    folder = tmp_path / "cache" / "kernels"
    made = CppCompiler(str(compiler), folder)
    made.library('extern "C" int one() { return 1; }')
    (library,) = folder.iterdir()
    assert (tmp_path / "told").read_text().startswith(str(folder / cpp_backend.SCRATCH))
    left, now = folder / f"{cpp_backend.SCRATCH}left", time.time()
    left.mkdir()
    (left / "cc.s").write_text("")
    made.library('extern "C" int two() { return 2; }')
    assert left.is_dir()  # for it may be at work
    os.utime(left, (now, now - cpp_backend.LEFT_SECONDS - 60))
    made.library('extern "C" int three() { return 3; }')
    assert not left.exists() and library.is_file()


def test_a_process_whose_main_thread_has_ended_says_nothing_of_trials_it_cannot_start(tmp_path):
    """From Python 3.12 on no thread and no process is started then, though others go on."""
    script = ("import sys, threading, time, types\n"
              "pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]]; sys.modules['featherweight'] = pack\n"
              "import torch\n"
              "from featherweight.ops import formats\n"
              "from featherweight.ops.kernels.proving import Prover\n"
              "from featherweight.ops.kernels.verdicts import Case\n"
              "def run(*arguments):\n"
              "    while threading.main_thread().is_alive(): time.sleep(0.01)\n"
              "    raise RuntimeError(\"can't start new thread at interpreter shutdown\")\n"
              "prover = Prover(torch.device('cpu'), ('fine',), run)\n"
              "prover.want([Case('unpack', 'Q4_0', torch.float32, None)])\n"
              "def last():\n"
              "    while prover.at_work: time.sleep(0.01)\n"
              "threading.Thread(target=last).start()\n")
    environment = os.environ | {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script, str(PACK)], capture_output=True, text=True, timeout=300,
                           env=environment)
    assert ended.returncode == 0 and not ended.stderr
