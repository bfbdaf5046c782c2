"""Connecting to Ray: a private Ray is out of reach of others, and a refusal is one message."""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

from devtools.cluster import QUIET, workflow

import psutil
import pytest
from process_tree import IMPORT_PACK, has, listening

from devtools import ROOT
from featherweight.cluster import batch_run, ray_connection
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.ray_connection import (
    MULTI_NODE_ENV,
    connect,
    is_cluster_raylet,
    resolve_address,
)

ray = pytest.importorskip("ray")
TIMEOUT = 120  # seconds, on a busy machine
LOCAL = IMPORT_PACK + """
sys.path[:] = [path for path in sys.path if path != sys.argv[1]]
from featherweight.cluster.ray_connection import connect
try:
    connect(sys.argv[2])
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
except RuntimeError as error:
    print(error, flush=True)
"""


def plain_environment(folder, home, **variables) -> dict[str, str]:
    """Returns the environment of a person who has set no variables of Ray."""
    environment = {name: value for name, value in {**os.environ, **QUIET}.items()
                   if name != MULTI_NODE_ENV and not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    home.mkdir(exist_ok=True)
    return {**environment, "RAY_TMPDIR": str(folder), "HOME": str(home), **variables}


@contextlib.contextmanager
def connected(environment, address="local"):
    """Yields the first line of a program that connects to a private Ray, or to a cluster."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL, str(ROOT), address], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def command(ray_folder, tmp_path_factory):
    """Runs batch.py on this computer alone, and sends it SIGTERM when a worker runs.

    Yields (addresses it listened on, its home folder, exit code, output).
    """
    folder = tmp_path_factory.mktemp("alone")
    (folder / "workflow.json").write_text(json.dumps(workflow()), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"id": "a", "7.seed": 1}\n', encoding="utf-8")
    files = [str(folder / name) for name in ("workflow.json", "rows.jsonl", "out")]
    process = psutil.Popen([
        sys.executable, str(ROOT / "batch.py"), *files, "--gpus", "0", "--cpus", "1",
        "--address", "local"
    ], env=plain_environment(ray_folder, folder / "home"), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + TIMEOUT
        while not has(process, "RowRenderer"):
            assert process.is_running() and time.monotonic() < end
            time.sleep(0.1)
        time.sleep(1)
        addresses = listening(process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT)
        yield addresses, folder / "home", process.returncode, output
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_batch_on_one_computer_listens_to_no_network(command):
    assert command[0] == {"127.0.0.1"}


def test_a_batch_on_one_computer_leaves_no_token_behind(command):
    """With a token, this user's next cluster would ask other machines for it."""
    assert not list(command[1].rglob("*token*"))


def test_a_batch_that_is_told_to_end_says_how_to_go_on(command):
    _, _, code, output = command
    assert code == 130, output
    assert "Stopped. What is in" in output and "Traceback" not in output
    assert "SIGTERM" not in output  # Ray prints it when its own handler ends the process


@pytest.mark.heavy  # Ray retries for 20 s
def test_a_cluster_that_asks_for_a_token_says_so(ray_folder, tmp_path):
    environment = plain_environment(ray_folder, tmp_path / "home", **{MULTI_NODE_ENV: "0"})
    with connected(environment) as address, connected(environment, address) as text:
        assert text.startswith(f"The Ray cluster at {address} cannot be used from here: ")
        assert "copy that file here and set RAY_AUTH_MODE=token" in text


class Process:
    def __init__(self, name, environment):
        self.name, self.environ = lambda: name, lambda: environment


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("raylet", {}, True),
        ("raylet.exe", {MULTI_NODE_ENV: "1"}, True),
        ("raylet", {MULTI_NODE_ENV: "0"}, False),
        ("python", {}, False),
    ],
)
def test_a_cluster_is_told_from_a_ray_that_a_program_has_alone(name, environment, expected):
    assert is_cluster_raylet(Process(name, environment)) is expected


def test_a_machine_without_a_cluster_gets_a_ray_of_its_own(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    processes = []
    monkeypatch.setattr(psutil, "process_iter", lambda: processes)
    assert resolve_address("auto") == "local"
    processes.append(Process("raylet", {}))
    assert resolve_address("auto") == "auto" and resolve_address("head:6379") == "head:6379"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert resolve_address("auto") == "head:6379"


@pytest.mark.parametrize(("address", "message"), [
    ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1 "), ("head", "head is not the address")])
def test_an_address_where_no_cluster_is_says_so(address, message):
    with pytest.raises(MachineError, match=message):
        connect(address)


def test_a_ray_of_other_own_functions_is_checked_by_what_is_left(monkeypatch):
    monkeypatch.delattr("ray._raylet.GcsClient")
    monkeypatch.delattr("ray._private.services.canonicalize_bootstrap_address")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        for one in (address, "auto"):
            ray_connection._check_answers(one)
    with pytest.raises(MachineError, match=f"No Ray cluster answers at {address} "):
        ray_connection._check_answers(address)


@pytest.mark.parametrize(("error", "message"), [
    (RuntimeError("Version mismatch: the cluster has\n    Ray: 2.59.0"),
     "Version mismatch: the cluster has Ray: 2.59.0"),
    (ConnectionError(), "ConnectionError"), (ray.exceptions.RayError("no token."), "no token")])
def test_what_ray_says_against_joining_is_one_sentence_of_a_batch(error, message, monkeypatch):
    monkeypatch.setattr(batch_run, "is_joined", lambda: False)
    monkeypatch.setattr(batch_run, "resolve_address", lambda address: "auto")
    monkeypatch.setattr(ray_connection, "_check_answers", lambda address: None)
    monkeypatch.setattr(ray, "init", Mock(side_effect=error))
    with pytest.raises(
            MachineError,
            match=f"The Ray cluster at auto cannot be used from here: {message}. If its first"):
        batch_run.Batch({}, "", "").connect()
