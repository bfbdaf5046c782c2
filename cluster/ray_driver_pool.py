"""Sends runs from ComfyUI to Ray through driver processes, so that ComfyUI imports no ray.

`cluster/ray_driver.py` is what such a process runs.
"""
import contextlib
import importlib.util
import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from ..child_process import end_process, start_process
from .comfyui_install import MachineError
from .ray_connection import (
    ADDRESS_ENV,
    AUTO_CONNECT_ENV,
    RAY_ADDRESS_ENV,
    check_address,
    local_environment,
)
from .ray_driver_messages import MessageError, read, write

PACK = Path(__file__).resolve().parent.parent
START = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from cluster.ray_driver import main;"
    " sys.path.pop(0); main()"
)
POLL_SECONDS = 0.1  # between two calls of `check`
JOIN_SECONDS = 120  # for a driver to start Ray on this computer, or to join a cluster
CANCEL_SECONDS = 10  # for a driver to end a run

OnEvent = Callable[[dict, bytes], object]
Check = Callable[[], object]


class DriverPool:
    """One driver process for this computer and one for the cluster, started by the first run.

    They end with this process, and so do a Ray that they started and its workers.

    Args:
        cluster: the address that the machine's owner named, or "".
    """

    def __init__(self, cluster: str = ""):
        self.cluster = cluster
        self.drivers: dict[bool, DriverProcess] = {}  # by `is_cluster`
        self.lock = threading.Lock()

    def run(self, is_cluster: bool, request: dict, on_event: OnEvent, check: Check,
            environment: Mapping[str, str] = {}):
        """Runs a request of `Driver.run` to its end.

        Args:
            is_cluster: whether it runs on the owner's cluster, and not on this computer.
            request: arguments of `Driver.run`, without the number.
            on_event: is called with the header and the data of each event.
            check: is called ten times a second and may raise, which cancels the run.
            environment: variables for a driver that is started by this run.

        Raises:
            MachineError: Ray is missing, cannot be reached, or the connection ended.
        """
        if importlib.util.find_spec("ray") is None:
            raise MachineError(
                f'Run on Ray needs Ray. Install it with: "{sys.executable}" -m pip install ray')
        if is_cluster:
            check_address(self.cluster)
        with self.lock:
            driver = self.drivers.get(is_cluster)
            if driver is None or not driver.is_usable():
                if driver:
                    driver.end()
                driver = self.drivers[is_cluster] = DriverProcess(
                    self.cluster if is_cluster else "", environment)
        driver.run(request, on_event, check)


def driver_environment(cluster: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a driver: this process's, with settings of Ray.

    Args:
        cluster: its address, "" for a private Ray.
        environment: further variables.
    """
    variables = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        AUTO_CONNECT_ENV: "0",
        ADDRESS_ENV: cluster,
        **environment,
    }
    variables.pop(RAY_ADDRESS_ENV, None)
    return variables if cluster else {**variables, **local_environment(variables)}


class DriverProcess:
    """A driver process. Its attribute `message` says why it ended, or is "".

    Args:
        cluster, environment: see `driver_environment`.
    """

    def __init__(self, cluster: str, environment: Mapping[str, str]):
        self.cluster = cluster
        self.message = ""
        self.has_joined = False
        self.numbers = itertools.count()
        self.events: dict[int, queue.SimpleQueue] = {}  # number of a run -> its (header, data)
        self.running: set[int] = set()  # numbers of runs
        self.cancelled: dict[int, float] = {}  # number of a run -> when it was cancelled
        self.outbox = queue.SimpleQueue()
        self.end_lock = threading.Lock()
        self.process = start_process(sys.executable, "-c", START, str(PACK), stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE,
                                     env=driver_environment(cluster, environment))
        self.requests = cast(BinaryIO, self.process.stdin)
        self.answers = cast(BinaryIO, self.process.stdout)
        self.started = time.monotonic()
        for target in (self._read, self._write):
            threading.Thread(target=target, daemon=True, name="Ray's driver").start()

    def is_usable(self) -> bool:
        """Returns whether the process runs and ends cancelled runs in time."""
        now = time.monotonic()
        return not self.message and all(
            now - since < CANCEL_SECONDS for since in self.cancelled.values()
        )

    def run(self, request: dict, on_event: OnEvent, check: Check):
        """Runs a request to its end, see `DriverPool.run`."""
        number = next(self.numbers)
        events = self.events[number] = queue.SimpleQueue()
        self.running.add(number)
        self.outbox.put({**request, "op": "run", "number": number})
        try:
            while True:
                try:
                    header, data = events.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    check()
                    if self.message:
                        raise MachineError(self.message) from None
                    if not self.has_joined and time.monotonic() - self.started > JOIN_SECONDS:
                        raise MachineError(
                            f"Ray did not start within {JOIN_SECONDS} s. Look into the log of"
                            " ComfyUI, and run again.") from None
                    continue
                if header["event"] == "error":
                    raise MachineError(header["message"])
                if header["event"] == "done":
                    return
                on_event(header, data)
                check()
        except BaseException:
            self._cancel(number)
            raise
        finally:
            self.events.pop(number, None)

    def _cancel(self, number: int):
        if not self.has_joined:  # it would go on trying to connect
            self.end()
            return
        self.cancelled[number] = time.monotonic()
        if number in self.running:
            self.outbox.put({"op": "cancel", "number": number})
        else:  # the run has ended meanwhile
            self.cancelled.pop(number, None)

    def end(self):
        """Ends the process, with a Ray that it started."""
        self.message = self.message or "Ray's driver was ended."
        self.outbox.put(None)
        with self.end_lock:
            end_process(self.process)

    def _write(self):
        """Writes requests in a thread, as the driver reads none until it has joined."""
        while (request := self.outbox.get()) is not None:
            try:
                write(self.requests, request)
            except MessageError as error:
                message = f"The workflow cannot be sent to Ray: {error}."
                self._deliver(request["number"], {"event": "error", "message": message}, b"")
            except (OSError, ValueError):  # the driver has ended, which `_read` reports
                return

    def _deliver(self, number: int, header: dict, data: bytes):
        if header["event"] in ("done", "error", "cancelled"):
            self.running.discard(number)
            self.cancelled.pop(number, None)
        if number in self.events:
            self.events[number].put((header, data))

    def _read(self):
        try:
            while (message := read(self.answers)) is not None:
                header, data = message
                if header["number"] is not None:
                    self._deliver(header["number"], header, data)
                elif header["event"] == "joined":
                    self.has_joined = True
                else:
                    self.message = header["message"]
        except (MessageError, OSError, ValueError) as error:
            self.message = self.message or f"Ray's driver sent an invalid message: {error}."
        cluster = f" at {self.cluster}" if self.cluster else ""
        self.message = self.message or (
            f"The connection to Ray{cluster} ended, as when its head node goes. Run again when it"
            " is back."
        )
        self.end()
        for stream in (self.requests, self.answers):
            with contextlib.suppress(OSError, ValueError):
                stream.close()
