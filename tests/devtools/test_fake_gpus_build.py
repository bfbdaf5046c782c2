"""Making the fake GPUs: once, and a plain sentence where it cannot be."""
import os
import subprocess
import sys

import pytest

from devtools import ROOT, fakegpu
from devtools.fakegpu import NoFakeGpus, build


@pytest.fixture(autouse=True)
def anew(tmp_path, monkeypatch):
    """Nothing is kept of what was built before, and torch is one that was built for CPUs."""
    monkeypatch.setattr(build, "KEPT", tmp_path)
    monkeypatch.setattr(build, "_torch", lambda: tmp_path)
    build.libraries.cache_clear()
    build.why_not.cache_clear()
    yield
    build.libraries.cache_clear()
    build.why_not.cache_clear()


def test_without_a_compiler_there_are_none(monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.shutil, "which", lambda command: None)
    assert fakegpu.why_not() == "fake GPUs need a C++ compiler, and there is none"


def test_on_another_system_there_are_none(monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")
    assert fakegpu.why_not() == "fake GPUs are built on Linux only"


@pytest.mark.skipif(sys.platform != "linux", reason="they are built on Linux only")
def test_a_compiler_that_refuses_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'driver.cpp:1: error: no' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NoFakeGpus,
                       match="could not be compiled for torch .*: driver.cpp:1: error: no"):
        fakegpu.libraries()
    assert {path.name for path in tmp_path.iterdir()} == {"c++", "lock"}


@pytest.mark.skipif(sys.platform != "linux", reason="they are built on Linux only")
def test_what_is_built_is_kept(monkeypatch):
    built = []
    monkeypatch.setattr(build, "_build", lambda compiler, folder:
                        (built.append(folder), folder.mkdir()))
    monkeypatch.setenv("CXX", sys.executable)
    assert fakegpu.libraries() == fakegpu.libraries()
    build.libraries.cache_clear()
    assert fakegpu.libraries() == built[0] and len(built) == 1


def test_any_command_runs_with_them(monkeypatch):
    monkeypatch.undo()
    if fakegpu.why_not():
        pytest.skip(fakegpu.why_not())
    look = ("import torch;"
            " print(torch.cuda.device_count(), torch.ones(3, device='cuda:1').sum().item())")
    command = [
        sys.executable, "-m", "devtools.fakegpu", "2x0.5", "--late", sys.executable, "-c", look
    ]
    assert (
        subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True).stdout
        == "2 3.0\n"
    )
