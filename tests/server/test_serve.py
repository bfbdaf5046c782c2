"""`dev.py serve`: one command, and the editor has models and workflows."""
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from process_tree import start_interruptible

from devtools import ROOT, serve
from devtools.files import demo_files
from devtools.host.server import HOST
from devtools.workflows import demo_paths

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")


def get(url: str):
    with urllib.request.urlopen(url, timeout=60) as reply:
        return json.loads(reply.read())


def touch(base, *names: str):
    """Lets files count as made below `base`/models."""
    for name in names:
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "models" / name).touch()


@pytest.fixture
def start(tmp_path):
    """start(): `dev.py serve` in a folder, in the Python of the tests."""
    processes = []

    def start() -> subprocess.Popen:
        processes.append(start_interruptible(
            [sys.executable, "dev.py", "serve", "--base", str(tmp_path)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "COMFYUI_PATH": str(HOST)}))
        return processes[0]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def address_in(lines) -> str:
    return next(address[0] for line in lines
                if (address := re.search(r"http://127\.0\.0\.1:\d+", line)))


def test_it_says_its_address_then_what_it_makes_and_has_what_the_demo_has(tmp_path, start):
    touch(tmp_path, serve.MIX_FILE)  # which takes a run of the server to make
    process, lines = start(), []
    for line in process.stdout:
        lines.append(line)
        if "All models are there" in line:
            break
    address = address_in(lines)
    before = lines.index(next(line for line in lines if address in line))
    steps = [line for line in lines if re.match(r"  \[\d+ of \d+\] ", line)]
    assert before < lines.index(steps[0]) and len(steps) > 5
    assert "Failed" not in "".join(lines)
    loader = get(f"{address}/object_info/FeatherweightLoadDiffusionModel")
    files = {demo_files.MODELS[name] for name in demo_files.recipes()}
    assert files <= set(re.findall(r'"([^"]+)"', json.dumps(loader)))
    listed = get(f"{address}/userdata?dir=workflows")
    assert set(listed) == {path.name for path in demo_paths()}
    assert len(listed) > 4 and not list(tmp_path.rglob("*.part"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


@pytest.mark.parametrize("name", [
    "SIGTERM", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("SIGINT", "SIGHUP"))])
def test_a_signal_ends_comfyui_with_it(tmp_path, start, name):
    touch(tmp_path, *serve.missing_files(tmp_path))
    process = start()
    address = address_in(process.stdout)
    assert get(f"{address}/system_stats")
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 0
    with pytest.raises(urllib.error.URLError):
        get(f"{address}/system_stats")


def test_the_mix_shows_each_quarter_of_its_long_nodes_once(capsys):
    show = serve.quarters_printer("mix")
    for node in ("2", "12", "13"):  # the dense model's loader, measuring, packing
        show(node, 0, 0)
        for value in range(41):
            show(node, value, 40)
    assert capsys.readouterr().out.splitlines() == [
        f"mix: {what}, {percent} %" for what in ("measuring", "packing")
        for percent in (25, 50, 75, 100)]
