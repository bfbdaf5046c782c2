"""How a program comes to Ray: a Ray of its own that nobody else reaches, and what is said where a
cluster refuses it."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

from devtools.cluster import QUIET, workflow

import psutil
import pytest
from process_tree import has, listening

from devtools import ROOT
from featherweight.cluster import batch, ray_connection
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.ray_connection import (
    MULTI_NODE_ENV,
    connect,
    is_cluster_raylet,
    resolve_address,
)

ray = pytest.importorskip("ray")
PATIENCE = 120  # seconds, on a machine that has much else to do
LOCAL = """
import sys, types
sys.path[:] = [path for path in sys.path if path != sys.argv[1]]
pack = types.ModuleType("featherweight")
pack.__path__ = [sys.argv[1]]
sys.modules["featherweight"] = pack
from featherweight.cluster import batch, ray_connection
from featherweight.cluster.ray_connection import connect
try:
    connect(sys.argv[2])
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
except RuntimeError as error:
    print(error, flush=True)
"""


def surroundings(folder, home, **variables) -> dict[str, str]:
    """What a person's shell has around it, who has set nothing of Ray's."""
    kept = {name: value for name, value in {**os.environ, **QUIET}.items()
            if name != MULTI_NODE_ENV and not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    home.mkdir(exist_ok=True)
    return {**kept, "RAY_TMPDIR": str(folder), "HOME": str(home), **variables}


@contextlib.contextmanager
def alone(environment, address="local"):
    """A program with a Ray of its own, or in a cluster: what it says first."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL, str(ROOT), address], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def command(ray_folder, tmp_path_factory):
    """batch.py on this computer alone, told to end when a worker draws: (addresses, its home,
    status, words)."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "workflow.json").write_text(json.dumps(workflow()), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"id": "a", "7.seed": 1}\n', encoding="utf-8")
    process = psutil.Popen([
        sys.executable,
        str(ROOT / "batch.py"), *(str(folder / name)
                                  for name in ("workflow.json", "rows.jsonl", "out")), "--gpus",
        "0", "--cpus", "1", "--address", "local"
    ], env=surroundings(ray_folder, folder / "home"), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + PATIENCE
        while not has(process, "RowRenderer"):
            assert process.is_running() and time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)
        found = listening(process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE)
        yield found, folder / "home", process.returncode, said
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_batch_on_one_computer_listens_to_no_network(command):
    assert command[0] == {"127.0.0.1"}


def test_a_batch_on_one_computer_leaves_no_token_behind(command):
    """Or this user's next cluster would ask other machines for it."""
    assert not list(command[1].rglob("*token*"))


def test_a_batch_that_is_told_to_end_says_how_to_go_on(command):
    _, _, status, said = command
    assert status == 130, said
    assert "Stopped. What is in" in said and "Traceback" not in said
    assert "SIGTERM" not in said  # Ray says so where its own handler ends the process


@pytest.mark.heavy  # Ray knocks for 20 s
def test_a_cluster_that_asks_for_a_token_says_so(ray_folder, tmp_path):
    environment = surroundings(ray_folder, tmp_path / "home", **{MULTI_NODE_ENV: "0"})
    with alone(environment) as address, alone(environment, address) as said:
        assert said.startswith(f"The Ray cluster at {address} cannot be used from here: ")
        assert "copy that file here and set RAY_AUTH_MODE=token" in said


class Process:
    def __init__(self, name, environment):
        self.name, self.environ = lambda: name, lambda: environment


@pytest.mark.parametrize(
    ("name", "environment", "found"),
    [
        ("raylet", {}, True),
        ("raylet.exe", {MULTI_NODE_ENV: "1"}, True),
        ("raylet", {MULTI_NODE_ENV: "0"}, False),
        ("python", {}, False),
    ],
)
def test_a_cluster_is_told_from_a_ray_that_a_program_has_alone(name, environment, found):
    assert is_cluster_raylet(Process(name, environment)) is found


def test_a_machine_without_a_cluster_gets_a_ray_of_its_own(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = []
    monkeypatch.setattr(psutil, "process_iter", lambda: found)
    assert resolve_address("auto") == "local"
    found.append(Process("raylet", {}))
    assert resolve_address("auto") == "auto" and resolve_address("head:6379") == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert resolve_address("auto") == "head:6379"


@pytest.mark.parametrize(("address", "said"), [
    ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1 "), ("head", "head is not the address")])
def test_an_address_where_no_cluster_is_says_so(address, said):
    with pytest.raises(MachineError, match=said):
        connect(address)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Version mismatch: the cluster has\n    Ray: 2.59.0"),
            "Version mismatch: the cluster has Ray: 2.59.0",
        ),
        (ConnectionError(), "ConnectionError"),
        (ray.exceptions.RayError("no token."), "no token"),
    ],
)
def test_what_ray_says_against_joining_is_one_sentence_of_a_batch(error, said, monkeypatch):
    monkeypatch.setattr(batch, "is_joined", lambda: False)
    monkeypatch.setattr(batch, "resolve_address", lambda address: "auto")
    monkeypatch.setattr(ray_connection, "_check_answers", lambda address: None)
    monkeypatch.setattr(ray, "init", Mock(side_effect=error))
    with pytest.raises(
            MachineError,
            match=f"The Ray cluster at auto cannot be used from here: {said}. If its first"):
        batch.Batch({}, "", "").connect()
