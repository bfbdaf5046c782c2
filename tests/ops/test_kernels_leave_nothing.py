"""A trial is alone, and leaves nothing behind."""
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from featherweight.ops import formats  # noqa: F401
from featherweight.ops.kernels import cpp_backend, trial_process
from featherweight.ops.kernels.cpp_backend import CppCompiler
from featherweight.ops.kernels.trial_process import only_one

PACK = Path(__file__).parents[2]
COMMAND = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes and files end otherwise on Windows")
needs_a_compiler = pytest.mark.skipif(COMMAND is None, reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(trial_process, "ASK_EVERY", 0.01)
    return tmp_path / "cache"


def test_two_trials_are_never_inside_at_once(cache, tmp_path):
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
    others = [subprocess.Popen([sys.executable, "-c", script, str(PACK)], cwd=tmp_path) for _ in range(2)]
    assert [other.wait(300) for other in others] == [0, 0]


def test_the_lock_of_trials_is_the_users_own(cache, tmp_path):
    """Another user may hold a file of any name in the shared temporary folder for ever."""
    with only_one() as alone:
        assert alone
        assert not [path for path in tmp_path.iterdir() if path != cache]
        lock, = (path for path in cache.rglob("*") if path.is_file())
        assert lock.parent.stat().st_mode & 0o777 == 0o700


def test_who_waits_for_another_trial_says_so_once_and_ends_with_its_process(cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    ending = threading.Event()
    monkeypatch.setattr(trial_process, "ending", ending)
    threading.Timer(0.3, ending.set).start()
    with only_one(), only_one() as alone:
        assert not alone
    (line,) = [record.message for record in caplog.records if "[Featherweight]" in record.message]
    assert "Another trial of kernels is under way" in line


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
