"""The driver process between ComfyUI and Ray: its messages, its errors and its end."""
import contextlib
import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from process_tree import IMPORT_PACK, has, wait_until

from devtools import ROOT
from featherweight.cluster import (
    ray_driver_messages,
    ray_driver_pool,
)
from featherweight.cluster.comfyui_install import MachineError

pytest.importorskip("ray")
TIMEOUT = 120  # seconds, on a busy machine
# Drivers without Ray: one ignores requests, one cancels a run on request, and one ends each run at
# once.
DEAF = """
import sys; sys.path.insert(0, sys.argv.pop())
from cluster.ray_driver_messages import read, write
write(sys.stdout.buffer, {"number": None, "event": "joined"})
while message := read(sys.stdin.buffer): pass
"""
OBEDIENT = DEAF.replace(": pass", """:
    header, _ = message
    event = {"run": "begins", "cancel": "cancelled"}[header["op"]]
    write(sys.stdout.buffer, {"number": header["number"], "event": event})
""")
HASTY = DEAF.replace(": pass", """:
    header, _ = message
    for event in ("failed", "done") if header["op"] == "run" else ():
        write(sys.stdout.buffer, {"number": header["number"], "event": event})
""")
PARENT = IMPORT_PACK + """
from featherweight.cluster.ray_driver_pool import DriverPool
DriverPool(sys.argv[2]).run(bool(sys.argv[2]), {}, print, lambda: print("waits", flush=True))
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


def test_a_message_is_json_and_bytes_and_one_that_is_cut_off_is_none():
    stream = io.BytesIO()
    ray_driver_messages.write(stream, {"op": "run", "graph": {"ü": [1, 2.5, None]}},
                          memoryview(b"x" * 1000))
    data = stream.getvalue()
    assert ray_driver_messages.read(io.BytesIO(data)) == (
        {"op": "run", "graph": {"ü": [1, 2.5, None]}},
        b"x" * 1000,
    )
    assert [ray_driver_messages.read(io.BytesIO(data[:length])) for length in (0, 5, 12, 500)] == [
        None
    ] * 4


def test_a_pickle_is_not_a_message(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    data = pickle.dumps(Evil())
    for stream in (data, struct.pack(">Q", len(data)) + data,
                   ray_driver_messages.LENGTHS.pack(len(data), 0) + data):
        with contextlib.suppress(ray_driver_messages.MessageError):
            assert ray_driver_messages.read(io.BytesIO(stream)) is None
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ((1 << 31, 0), "the header of a message has 2147483648 bytes"),
        ((0, 1 << 40), "the data of a message has 1099511627776"),
        ((4, 0), "not valid JSON"),
        ((2, 0), "not a JSON object"),
    ],
)
def test_what_is_too_large_or_no_json_is_refused_before_it_is_read(head, message):
    class Source(io.BytesIO):
        def read(self, size):
            assert size <= 12
            return super().read(size)

    with pytest.raises(ray_driver_messages.MessageError, match=message):
        ray_driver_messages.read(Source(ray_driver_messages.LENGTHS.pack(*head) + b"[]xx"))


def test_a_value_that_is_no_json_is_refused():
    with pytest.raises(ray_driver_messages.MessageError,
                       match="a value cannot be sent as JSON: Object of type bytes"):
        ray_driver_messages.write(io.BytesIO(), {"graph": b"x"})


def refusal(drivers: ray_driver_pool.DriverPool) -> str:
    """Returns the message of a run on a cluster that does not answer."""
    with pytest.raises(MachineError) as error:
        drivers.run(True, {}, print, lambda: None)
    return str(error.value)


def test_where_no_ray_answers_is_one_sentence_and_nothing_is_left():
    """It takes ten seconds on an idle machine; `ray.init` would try for minutes."""
    with listener() as silent, listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as web:
        before, started = children(), time.monotonic()
        addresses = ["127.0.0.1:1", "192.0.2.1:6379", silent, web]
        pools = [ray_driver_pool.DriverPool(address) for address in addresses]
        with ThreadPoolExecutor() as threads:
            errors = list(threads.map(refusal, pools))
        errors.append(refusal(pools[0]))  # from a second driver
        assert time.monotonic() - started < TIMEOUT
        for address, error in zip([*addresses, addresses[0]], errors):
            assert error.startswith(f"No Ray cluster answers at {address} ") and "\n" not in error
        wait_until(lambda: not new_children(before))
        # no process is left that was not waited for
        assert all(drivers.drivers[True].process.returncode is not None for drivers in pools)


def test_cancel_works_while_a_driver_joins_and_ends_it():
    with listener() as address:
        before, drivers = children(), ray_driver_pool.DriverPool(address)
        with pytest.raises(Interrupted):
            # more than fits into a pipe
            drivers.run(True, {"graph": "x" * (1 << 20)}, print, after(0.5))
        wait_until(lambda: not new_children(before))
        wait_until(
            lambda: not any(thread.name == "Ray's driver" for thread in threading.enumerate()))


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
@pytest.mark.parametrize("is_local", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_a_driver_ends_with_a_comfyui_that_is_killed(is_local, ray_folder, tmp_path):
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


def test_a_driver_that_ends_is_reported_and_the_next_run_has_another(monkeypatch):
    """When the head of a cluster ends, so does the driver, but not ComfyUI's process."""
    monkeypatch.setattr(ray_driver_pool, "START", DEAF)
    drivers, ended = ray_driver_pool.DriverPool("auto"), []

    def end():
        ended.append(drivers.drivers[True].process)
        ended[-1].kill()

    for _ in range(2):
        with pytest.raises(MachineError, match="The connection to Ray at auto ended"):
            drivers.run(True, {}, lambda *_: None, end)
    assert len(set(ended)) == 2


def test_a_cancelled_run_leaves_its_driver_for_the_next(monkeypatch):
    monkeypatch.setattr(ray_driver_pool, "START", OBEDIENT)
    drivers, events = ray_driver_pool.DriverPool("auto"), []

    def stop(header, data):
        events.append(header["event"])
        raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            drivers.run(True, {}, stop, lambda: None)
        driver = drivers.drivers[True]
        wait_until(lambda: not driver.cancelled)
    assert events == ["begins", "begins"] and driver.is_usable() and driver.process.poll() is None
    driver.end()


def test_a_run_that_ends_while_it_is_cancelled_leaves_its_driver_for_the_next(monkeypatch):
    monkeypatch.setattr(ray_driver_pool, "START", HASTY)
    monkeypatch.setattr(ray_driver_pool, "CANCEL_SECONDS", 0)
    drivers, processes = ray_driver_pool.DriverPool("auto"), set()

    def stop(header, data):
        wait_until(lambda: not drivers.drivers[True].running)
        raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            drivers.run(True, {}, stop, lambda: None)
        processes.add(drivers.drivers[True].process.pid)
    assert len(processes) == 1
    drivers.drivers[True].end()


def test_a_driver_that_does_not_cancel_is_ended_and_the_next_run_has_another(monkeypatch):
    monkeypatch.setattr(ray_driver_pool, "START", DEAF)
    monkeypatch.setattr(ray_driver_pool, "CANCEL_SECONDS", 0.2)
    drivers, processes = ray_driver_pool.DriverPool("auto"), []
    for _ in range(2):
        with pytest.raises(Interrupted):
            drivers.run(True, {}, print, lambda: drivers.drivers[True].has_joined and after(-1)())
        processes.append(drivers.drivers[True].process)
        wait_until(lambda: not drivers.drivers[True].is_usable())
    assert processes[0].returncode is not None and processes[1].pid != processes[0].pid
    drivers.drivers[True].end()


def test_a_driver_of_this_computer_gets_no_address_and_one_of_the_cluster_the_owners(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:1")
    monkeypatch.setenv("FEATHERWEIGHT_RAY_ADDRESS", "head:6379")
    before = dict(os.environ)
    local = ray_driver_pool.driver_environment("", {"COMFYUI_PATH": "x"})
    cluster = ray_driver_pool.driver_environment("head:6379", {})
    assert "RAY_ADDRESS" not in local
    assert local["FEATHERWEIGHT_RAY_ADDRESS"] == "" and local["COMFYUI_PATH"] == "x"
    assert local["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and len(local["RAY_AUTH_TOKEN"]) == 64
    assert cluster["FEATHERWEIGHT_RAY_ADDRESS"] == "head:6379" and "RAY_ADDRESS" not in cluster
    assert dict(os.environ) == before
