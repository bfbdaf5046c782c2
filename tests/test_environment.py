"""The first set-up: a line for each step with the time left; of pip nothing unless it fails."""
import re
import sys
from pathlib import Path

import pytest

from devtools.host import environment, setup_progress

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


def test_the_set_up_begins_every_step_once():
    source = Path(environment.__file__).read_text(encoding="utf-8")
    assert sorted(re.findall(r'progress\.begin\("(\w+)"', source)) == sorted(STEPS)


@pytest.fixture
def own_python(tmp_path):
    """A path next to which pip's mark can be written, that runs this Python."""
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
