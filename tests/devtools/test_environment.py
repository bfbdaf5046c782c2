"""The first set-up: a line for each step with the time left; of pip nothing unless it fails. A
Python of the user's own needs no more than a command uses. What is run ends with dev.py."""
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import psutil
import pytest
from process_tree import start_interruptible

from devtools import ROOT
from devtools.host import environment, setup_progress
from devtools.host.server import HOST

STEPS = list(setup_progress.SECONDS)


@pytest.fixture
def elapsed(monkeypatch):
    """elapsed(seconds): so much of the set-up is over."""
    now = 0.0

    def elapsed(seconds):
        nonlocal now
        now = seconds
    monkeypatch.setattr(setup_progress.time, "monotonic", lambda: now)
    return elapsed


def test_each_step_is_a_line_with_its_number_and_the_time_left(elapsed, capsys):
    progress = setup_progress.SetupProgress()
    for index, name in enumerate(STEPS):
        elapsed(sum(list(setup_progress.SECONDS.values())[:index]))
        progress.begin(name, f"Doing {name}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(STEPS)
    for number, (name, line) in enumerate(zip(STEPS, lines), 1):
        assert line.startswith(f"[{number} of {len(STEPS)}] Doing {name}, about ")
    assert lines[0].endswith("about 2 min left") and lines[-1].endswith("about 10 s left")


def test_on_a_slow_connection_the_time_left_grows(elapsed, capsys):
    progress = setup_progress.SetupProgress()
    elapsed(10 * sum(setup_progress.SECONDS[name] for name in ("venv", "ComfyUI", "torch")))
    progress.begin("packages", "Installing")
    assert capsys.readouterr().out == "[4 of 6] Installing, about 12 min left\n"


@pytest.fixture
def own_python(tmp_path, monkeypatch):
    """A path next to which pip's mark can be written, that runs this Python, or the system's."""
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1")
    if sys.platform == "win32":
        pytest.skip("makes a link")
    path = tmp_path / "venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    return path


def test_pip_is_silent_where_it_works(own_python, capfd):
    environment.pip(own_python, action="list")
    assert capfd.readouterr() == ("", "")


def test_pips_message_is_printed_where_it_fails(own_python, capfd):
    with pytest.raises(environment.SetupError, match="its message is above"):
        environment.pip(own_python, "--no-index", "featherweight-not-a-package")
    assert "No matching distribution" in capfd.readouterr().out


def test_serve_needs_no_linter_in_a_python_of_the_users_own(tmp_path):
    if sys.platform == "win32":
        pytest.skip("makes a link")
    venv.create(tmp_path, with_pip=False)
    python, packages = (sysconfig.get_path(name, vars={"base": str(tmp_path)})
                        for name in ("scripts", "purelib"))
    tools = environment.LINTING.keys() | environment.TESTING.keys() - environment.SERVING.keys()
    Path(packages, "tools.pth").write_text(f"{sysconfig.get_path('purelib')}\nimport no_tools\n")
    Path(packages, "no_tools.py").write_text(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(tools)}))\n")  # importing them is an error

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([f"{python}/python", "dev.py", *arguments], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "COMFYUI_PATH": str(HOST)})

    served, linted = run("serve", "--help"), run("lint")
    assert served.returncode == 0 and "--base" in served.stdout, served.stdout + served.stderr
    assert re.search(r"Failed: .* lacks ruff, 'pyright\[nodejs\]'\. ", linted.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_a_command_runs_gets_its_signals(name, tmp_path):
    command = ("import sys; from pathlib import Path; from devtools.host.environment import *; "
               f"print(Environment(Path('.'), Path({sys.executable!r})).run('-c', "
               "'import time; print(1, flush=True); time.sleep(600)'))")
    process = start_interruptible([sys.executable, "-c", command], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "1\n"
        children = psutil.Process(process.pid).children()
        process.send_signal(getattr(signal, name))
        assert process.wait(30) == 0 and not any(child.is_running() for child in children)
        assert process.stdout.read() == f"{-getattr(signal, name)}\n"
    finally:
        process.kill()
        process.wait()


def test_a_clone_in_a_folder_of_the_repositorys_name_passes_the_linter(tmp_path):
    pytest.importorskip("ruff")
    clone = tmp_path / "ComfyUI-Featherweight"
    clone.mkdir()
    for name in ("pyproject.toml", "__init__.py"):
        shutil.copyfile(ROOT / name, clone / name)
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", str(clone)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
