"""Prompts for workers of Ray, from a ComfyUI: by way of a process (`cluster/driver.py`), so that no
ray is imported here."""
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

from ..child_process import end_process, start_process
from .comfyui_install import MachineError
from .messages import MessageError, read, write
from .ray_connection import ALONE, RAYS_OWN, VARIABLE, check_form, local_environment

PACK = Path(__file__).resolve().parent.parent
START = "import sys; sys.path.insert(0, sys.argv.pop()); from cluster.driver import main; sys.path.pop(0); main()"
POLL = 0.1  # seconds between two looks at whether to go on
JOIN_SECONDS = 120  # that a driver has to start a Ray of this computer, or to join a cluster
CANCEL_SECONDS = 10  # that a driver has to end a run


class DriverPool:
    """A driver's process for this computer and one for the cluster, each started by the first run
    that needs it.

    They are kept until this process ends: with them go a Ray that they started and its workers.

    Args:
        cluster: the address that the machine's owner named, or "".
    """

    def __init__(self, cluster: str = ""):
        self.cluster, self.drivers, self.lock = cluster, {}, threading.Lock()

    def run(self, is_cluster: bool, request: dict, on_event: Callable, check: Callable,
            environment: Mapping[str, str] = {}):
        """Runs a request of `Driver.run` to its end.

        Args:
            is_cluster: whether it runs on the owner's cluster, and not on this computer.
            request: what `Driver.run` takes, without the number.
            on_event: is called with a header of the driver and its data.
            check: is called ten times a second and may raise, which cancels the run.
            environment: variables for a driver of this computer that has yet to start.

        Raises:
            MachineError: Ray is missing, or cannot be reached, or went away.
        """
        if importlib.util.find_spec("ray") is None:
            raise MachineError(
                f'Run on Ray needs Ray. Install it with: "{sys.executable}" -m pip install ray')
        if is_cluster:
            check_form(self.cluster)
        with self.lock:
            driver = self.drivers.get(is_cluster)
            if driver is None or not driver.is_usable():
                if driver:
                    driver.end()
                driver = self.drivers[is_cluster] = DriverProcess(
                    self.cluster if is_cluster else "", environment)
        driver.run(request, on_event, check)


def driver_environment(cluster: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a driver: this process's, with what Ray reads from it. cluster: its
    address, "" for none."""
    variables = {
        **os.environ, "RAY_USAGE_STATS_ENABLED": "0", ALONE: "0", VARIABLE: cluster, **environment
    }
    variables.pop(RAYS_OWN, None)
    return variables if cluster else {**variables, **local_environment(variables)}


class DriverProcess:
    """A driver's process. message: why it ended, in one sentence."""

    def __init__(self, cluster: str, environment: Mapping[str, str]):
        self.cluster, self.message, self.has_joined = cluster, "", False
        self.numbers, self.events = itertools.count(), {}
        self.running, self.cancelled = set(), {}  # numbers; number -> when it was cancelled
        self.outbox, self.ending = queue.SimpleQueue(), threading.Lock()
        self.process = start_process(sys.executable, "-c", START, str(PACK), stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE,
                                     env=driver_environment(cluster, environment))
        self.started = time.monotonic()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True, name="Ray's driver").start()

    def is_usable(self) -> bool:
        """Whether it runs and has ended what was cancelled in time."""
        now = time.monotonic()
        return not self.message and all(
            now - since < CANCEL_SECONDS for since in self.cancelled.values()
        )

    def run(self, request: dict, on_event: Callable, check: Callable):
        number = next(self.numbers)
        events = self.events[number] = queue.SimpleQueue()
        self.running.add(number)
        self.outbox.put({**request, "op": "run", "number": number})
        try:
            while True:
                try:
                    header, data = events.get(timeout=POLL)
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
        if not self.has_joined:  # it would go on trying
            self.end()
            return
        self.cancelled[number] = time.monotonic()
        if number in self.running:
            self.outbox.put({"op": "cancel", "number": number})
        else:  # it has ended meanwhile
            self.cancelled.pop(number, None)

    def end(self):
        """Ends the process, with a Ray that it started."""
        self.message = self.message or "Ray's driver was ended."
        self.outbox.put(None)
        with self.ending:
            end_process(self.process)

    def _write(self):
        """Writes requests, in a thread of its own: a pipe takes 64 KiB, and the driver reads none
        while it joins."""
        while (request := self.outbox.get()) is not None:
            try:
                write(self.process.stdin, request)
            except MessageError as error:
                message = f"The workflow cannot be sent to Ray: {error}."
                self._put(request["number"], {"event": "error", "message": message}, b"")
            except (OSError, ValueError):  # it has ended, which `_read` reports
                return

    def _put(self, number: int, header: dict, data: bytes):
        if header["event"] in ("done", "error", "cancelled"):
            self.running.discard(number)
            self.cancelled.pop(number, None)
        if number in self.events:
            self.events[number].put((header, data))

    def _read(self):
        try:
            while (message := read(self.process.stdout)) is not None:
                header, data = message
                if header["number"] is not None:
                    self._put(header["number"], header, data)
                elif header["event"] == "joined":
                    self.has_joined = True
                else:
                    self.message = header["message"]
        except (MessageError, OSError, ValueError) as error:
            self.message = self.message or f"Ray's driver sent what is not a message: {error}."
        cluster = f" at {self.cluster}" if self.cluster else ""
        self.message = self.message or (
            f"The connection to Ray{cluster} ended, as when its head node goes. Run again when it"
            " is back."
        )
        self.end()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                stream.close()
