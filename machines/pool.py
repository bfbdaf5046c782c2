"""Prompts for workers of Ray, from a ComfyUI: by way of a process (`machines/driver.py`), so that no ray is imported here."""
import importlib.util
import itertools
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from .driver import install, pickled, read
from .place import MachineError

PACK = Path(__file__).resolve().parent.parent
START = "import sys; sys.path.insert(0, sys.argv.pop()); from machines.driver import main; sys.path.pop(0); main()"
POLL = 0.1  # seconds between two looks at whether to go on


class Pool:
    """A driver's process for each address, kept until this process ends: with it go a Ray that it started and its workers."""

    def __init__(self):
        self.drivers, self.numbers, self.lock = {}, itertools.count(), threading.Lock()

    def run(self, address: str, request: dict, told: Callable, check: Callable, environment: Mapping[str, str] = {}):
        """Run what `Driver.run` takes. told(event, data) hears of it; check is called ten times a second and may raise, which
        cancels it. environment: for a driver that is not there yet. Raises MachineError.
        """
        if importlib.util.find_spec("ray") is None:
            raise MachineError(install())
        with self.lock:
            driver = self.drivers.get(address)
            if driver is None or not driver.alive():
                driver = self.drivers[address] = Process(address, environment)
            number = next(self.numbers)
        answers = driver.answers[number] = queue.SimpleQueue()
        try:
            driver.send(("run", number, request))
            while True:
                try:
                    event, data = answers.get(timeout=POLL)
                except queue.Empty:
                    check()
                    if driver.said:  # before this run was known to it
                        raise MachineError(driver.said) from None
                    continue
                if event == "error":
                    raise MachineError(data)
                if event == "done":
                    return
                told(event, data)
                check()
        except BaseException:
            driver.send(("cancel", number))
            raise
        finally:
            driver.answers.pop(number, None)


class Process:
    """A driver's process. answers: number of a run -> queue of (event, data)."""

    def __init__(self, address: str, environment: Mapping[str, str]):
        self.address, self.answers, self.said = address, {}, ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, address, str(PACK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment},
            start_new_session=True)  # Ctrl-C is ComfyUI's, whose end ends this
        threading.Thread(target=self._read, daemon=True, name="Ray's driver").start()

    def alive(self) -> bool:
        return self.process.poll() is None and not self.said

    def send(self, message):
        try:
            self.process.stdin.write(pickled(message))
            self.process.stdin.flush()
        except (OSError, ValueError):  # it has ended, which `_read` tells
            pass

    def _read(self):
        while (message := read(self.process.stdout)) is not None:
            number, event, data = message
            if number is None:
                self.said = data
            elif number in self.answers:
                self.answers[number].put((event, data))
        self.said = self.said or (f"The connection to Ray{f' at {self.address}' * bool(self.address)} ended, as when its head"
                                  " node goes. Run again when it is back.")
        for answers in list(self.answers.values()):
            answers.put(("error", self.said))
