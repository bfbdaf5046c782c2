"""The process between ComfyUI and Ray: what it sends, its errors and its end."""
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import psutil
import pytest
from process_tree import IMPORT_PACK, has, wait_until

from devtools import ROOT
from featherweight.cluster import batch_child
from featherweight.cluster.batch_child import BatchChild, JobImages
from featherweight.cluster.comfyui_install import MachineError
from featherweight.cluster.workflow_graph import GraphError

pytest.importorskip("ray")
TIMEOUT = 120  # seconds, on a busy machine
REQUEST = {"graph": {}, "images": ["8", 0], "changes": [{}], "workers": 0, "on_cpu": True,
           "idle_seconds": 60}
# Children without Ray: one does not answer and ends with its input, one ignores the end of that
# too and has a child of its own, one ends at once, and one says its environment.
OBEDIENT = "import sys; sys.stdin.read()"
DEAF = ("import subprocess, sys, time; print(file=sys.stderr);"
        " subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']);"
        " time.sleep(1000)")
HASTY = "import sys; sys.stdin.readline()"
FAILING = """
import sys
for line in sys.stdin:
    print('{"text": "attic has no file"}\\n{"end": "Job 1 of 1 failed: why"}', flush=True)
"""
SAYING = """
import json, os, sys
print(json.dumps({"end": json.dumps(dict(os.environ))}), flush=True); sys.stdin.read()
"""
PARENT = IMPORT_PACK + f"""
from featherweight.cluster.batch_child import BatchChild
BatchChild(sys.argv[2]).run({REQUEST!r}, print, lambda: print("waits", flush=True))
"""


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def listener(answer: bytes = b""):
    """Yields the address of a server that is not Ray, and sends `answer` to each connection."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    if answer:
                        connection.sendall(answer)

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
    for connection in connections:
        connection.close()


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def new_children(before) -> list[psutil.Process]:
    return [child for child in children() if child not in before]


def after(seconds: float):
    """Returns a function that raises Interrupted when it is called after some seconds."""
    start = time.monotonic()

    def check():
        if time.monotonic() - start > seconds:
            raise Interrupted

    return check


def run(child: BatchChild, check=lambda: None, show=lambda *_: None, **environment) -> str:
    """Returns the message of a run that fails."""
    with pytest.raises(MachineError) as error:
        child.run(REQUEST, show, check, environment)
    return str(error.value)


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Yields a function that puts a program in the place of `batch.py`."""
    def put(text: str):
        monkeypatch.setattr(batch_child, "BATCH", tmp_path / "program.py")
        (tmp_path / "program.py").write_text(text, encoding="utf-8")

    return put


def test_where_no_ray_answers_is_one_sentence_and_nothing_is_left(tmp_path, monkeypatch):
    """It takes ten seconds on an idle machine; `ray.init` would try for minutes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(batch_child.tempfile, "tempdir", None)
    with listener() as silent, listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as web:
        before, started = children(), time.monotonic()
        addresses = ["127.0.0.1:1", "192.0.2.1:6379", silent, web]
        processes = [BatchChild(address) for address in addresses]
        with ThreadPoolExecutor() as threads:
            errors = list(threads.map(run, processes))
        errors.append(run(processes[0]))  # by the same process
        assert time.monotonic() - started < TIMEOUT
        for address, error in zip([*addresses, addresses[0]], errors):
            assert error.startswith(f"No Ray cluster answers at {address} ") and "\n" not in error
        for process in processes:
            process.end()
        assert new_children(before) == [] and os.listdir(tmp_path) == []


def test_cancel_works_while_a_cluster_is_joined(tmp_path):
    with listener() as address:
        before, child = children(), BatchChild(address)
        with pytest.raises(Interrupted):
            # more than fits into a pipe
            child.run({**REQUEST, "graph": "x" * (1 << 20)}, lambda *_: None, after(0.5))
        assert new_children(before) == []
        assert not any(thread.name == "batch.py serve" for thread in threading.enumerate())


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
@pytest.mark.parametrize("is_local", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_it_ends_with_a_comfyui_that_is_killed(is_local, ray_folder, tmp_path):
    """It also ends while it connects."""
    with listener() as address:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT,
             str(ROOT), "" if is_local else address], cwd=tmp_path, stdout=subprocess.PIPE,
            env={**os.environ, "RAY_TMPDIR": str(ray_folder)})
        parent.stdout.readline()
        if is_local:
            wait_until(lambda: has(psutil.Process(parent.pid), "gcs_server"))
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert processes
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert psutil.wait_procs(processes, timeout=TIMEOUT)[1] == []


def test_one_that_ends_is_reported_and_the_next_run_has_another(program):
    """When the head of a cluster ends, so does the process, but not ComfyUI's."""
    program(HASTY)
    child = BatchChild("auto")
    for _ in range(2):
        assert run(child).startswith("The connection to Ray at auto ended")
        assert child.process is None


def test_a_job_that_fails_leaves_the_process_for_the_next_run(program):
    program(FAILING)
    child, shown, processes = BatchChild(), [], set()
    for _ in range(2):
        assert run(child, show=lambda *each: shown.append(each)) == "Job 1 of 1 failed: why"
        processes.add(child.process.pid)
    assert shown == [(0, "attic has no file")] * 2 and len(processes) == 1
    child.end()


@pytest.mark.parametrize("text", [OBEDIENT, DEAF])
def test_a_cancelled_run_ends_all_that_was_started_and_the_next_has_another(
        program, monkeypatch, text):
    monkeypatch.setattr(batch_child, "END_SECONDS", 3)
    program(text)
    child, processes = BatchChild(), []
    for _ in range(2):
        before = children()

        def cancel(before=before):
            if len(new_children(before)) == (2 if text == DEAF else 1):
                processes.append(new_children(before))
                raise Interrupted

        started = time.monotonic()
        with pytest.raises(Interrupted):
            child.run(REQUEST, lambda *_: None, cancel)
        assert time.monotonic() - started < TIMEOUT
        assert psutil.wait_procs(processes[-1], timeout=10)[1] == []
        assert not os.path.exists(child.folder.name)
    assert processes[0] != processes[1]


def test_what_is_no_json_is_not_sent():
    child = BatchChild()
    with pytest.raises(GraphError, match="cannot be sent to Ray: Object of type bytes is not JSON"):
        child.run({**REQUEST, "graph": b"x"}, lambda *_: None, lambda: None)
    assert child.process is None


def test_one_of_this_computer_gets_no_address_and_one_of_the_cluster_the_owners(
        program, monkeypatch):
    program(SAYING)
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    monkeypatch.setenv("FEATHERWEIGHT_RAY_ADDRESS", "head:6379")
    before = dict(os.environ)
    for address in ("", "head:6379"):
        child = BatchChild(address)
        found = json.loads(run(child, COMFYUI_PATH="x", FEATHERWEIGHT_RAY_ADDRESS="other:1"))
        assert found["FEATHERWEIGHT_RAY_ADDRESS"] == address and found["COMFYUI_PATH"] == "x"
        assert "RAY_ADDRESS" not in found
        child.end()
    assert dict(os.environ) == before


# --- the images ---

@pytest.fixture
def saved(tmp_path):
    """Returns a function that saves images of a value and returns their path."""
    def save(value=0.0, width=4, count=1):
        path = tmp_path / "images.npy"
        numpy.save(path, numpy.full((count, 2, width, 3), value, numpy.float32))
        return str(path)

    return save


def test_images_lie_in_the_order_of_their_jobs_in_one_array(saved):
    images = JobImages(3)
    for job in (2, 0, 1):
        path = saved(job, count=2)
        images.add(job, path)
        assert not os.path.exists(path)
    assert images.in_order() is images.all
    assert images.in_order()[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (0, 1, 2)])
def test_jobs_with_other_numbers_of_images_keep_their_order(saved, order):
    images, counts = JobImages(3), (3, 2, 1)
    for job in order:
        images.add(job, saved(job, count=counts[job]))
    assert images.in_order()[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 2]


def test_more_images_than_memory_are_refused_at_the_first(saved, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory",
                        lambda: types.SimpleNamespace(available=1_000_000))
    with pytest.raises(
            GraphError, match="100000 jobs of 4 x 2 take 0.0 GB of memory here, and 0.0 GB are"):
        JobImages(100_000).add(0, saved())


def test_images_of_other_sizes_are_refused_in_a_sentence(saved):
    images = JobImages(3)
    images.add(1, saved())
    with pytest.raises(
            GraphError,
            match="Job 3 of 3 is 5 x 2, job 2 is 4 x 2: images of one run have one size"):
        images.add(2, saved(width=5))


def test_a_pickle_is_no_image(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    (tmp_path / "pickle").write_bytes(pickle.dumps(Evil()))
    numpy.save(tmp_path / "objects.npy", numpy.array([Evil()], dtype=object), allow_pickle=True)
    for name in ("pickle", "objects.npy"):
        with pytest.raises(ValueError, match="pickle"):
            JobImages(1).add(0, str(tmp_path / name))
    assert not (tmp_path / "was here").exists()
