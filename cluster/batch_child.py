"""Keeps a `batch.py serve` that renders the runs of *Run on Ray*, so that ComfyUI imports no ray.

`cluster/run_server.py` is what that process runs.
"""
import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import psutil

from ..child_process import end_process, start_process
from .comfyui_install import MachineError
from .ray_connection import ADDRESS_ENV, RAY_ADDRESS_ENV
from .workflow_graph import GraphError

BATCH = Path(__file__).resolve().parent.parent / "batch.py"
POLL_SECONDS = 0.1  # between two calls of `check`
END_SECONDS = 10  # for the process to end itself, Ray and the workers


class BatchChild:
    """One `batch.py serve`, started by the first run.

    It ends with this process or with a run that is interrupted, and so do a Ray that it started and
    the workers.

    Args:
        cluster: the address that the machine's owner named, "" for a Ray on this computer alone.
    """

    def __init__(self, cluster: str = ""):
        self.cluster = cluster
        self.process: Any = None
        self.lock = threading.Lock()

    def run(self, request: dict, on_progress: Callable[[int, str], object],
            check: Callable[[], object], environment: Mapping[str, str] = {}) -> numpy.ndarray:
        """Renders a run and returns the images of its jobs, in their order.

        Args:
            request: arguments of `RunServer.run` without `out`, and "idle_seconds".
            on_progress: is called with (number of jobs that are done, the latest message or "").
            check: is called ten times a second and may raise, which ends the process.
            environment: variables for a process that is started by this run.

        Raises:
            MachineError: Ray is missing, cannot be reached, or the run failed.
            GraphError: the images cannot be put together.
        """
        if importlib.util.find_spec("ray") is None:
            raise MachineError(
                f'Run on Ray needs Ray. Install it with: "{sys.executable}" -m pip install ray')
        with self.lock:
            try:
                if self.process is None or not self.reader.is_alive():
                    self.end()
                    self._start(environment)
                images, message = self._render(request, on_progress, check)
            except BaseException:
                self.end()
                raise
        if message:
            raise MachineError(message)
        return images.in_order()

    def _start(self, environment: Mapping[str, str]):
        variables = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment,
                     ADDRESS_ENV: self.cluster}
        variables.pop(RAY_ADDRESS_ENV, None)
        # removed at the latest when this process ends
        self.folder = tempfile.TemporaryDirectory(
            prefix="featherweight-ray-", ignore_cleanup_errors=True)
        self.messages = queue.SimpleQueue()  # None at the end
        self.process = start_process(sys.executable, str(BATCH), "serve", stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, env=variables)
        self.reader = threading.Thread(target=self._read, args=(self.process, self.messages),
                                       daemon=True, name="batch.py serve")
        self.reader.start()

    @staticmethod
    def _read(process, messages: queue.SimpleQueue):
        with contextlib.suppress(ValueError):
            for line in process.stdout:
                messages.put(json.loads(line))
        messages.put(None)

    def _render(self, request: dict, on_progress: Callable[[int, str], object],
                check: Callable[[], object]) -> tuple["JobImages", str]:
        """Returns the images, and why the run failed or ""."""
        images, text = JobImages(len(request["changes"])), ""
        try:
            line = json.dumps({**request, "out": self.folder.name})
        except (TypeError, ValueError, RecursionError) as error:
            raise GraphError(f"The workflow cannot be sent to Ray: {error}.") from error
        with contextlib.suppress(OSError):  # it has ended, which `_read` reports
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        while True:
            check()
            try:
                message = self.messages.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if message is None:
                cluster = f" at {self.cluster}" if self.cluster else ""
                raise MachineError(f"The connection to Ray{cluster} ended, as when its head node"
                                   " goes. Run again when it is back.")
            if "end" in message:
                return images, message["end"]
            if "job" in message:
                images.add(message["job"], message["file"])
            text = message.get("text", text)
            on_progress(len(images.parts), text)

    def end(self):
        """Ends the process, a Ray that it started, and the workers."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.reader.join(END_SECONDS)  # until the process has closed its output
        end_process(self.process)  # with what is left of its group
        self.reader.join()
        self.process.stdout.close()
        self.process = None
        self.folder.cleanup()


class JobImages:
    """The images of a run's jobs, (N, H, W, C) each in float32. count: how many jobs there are."""

    def __init__(self, count: int):
        self.count = count
        self.parts: dict[int, numpy.ndarray] = {}  # by job

    def add(self, job: int, path: str):
        """Takes a job's images from a file and removes that.

        Raises:
            GraphError: they have another size than those of other jobs, or too little memory is
                free for all jobs.
        """
        images = numpy.load(path, allow_pickle=False)
        os.unlink(path)
        if not self.parts:
            self.first = job
            self.all = self._allocate(images)
        shape = self.all.shape[1:]
        if images.shape[1:] != shape:
            raise GraphError(
                f"Job {job + 1} of {self.count} is {_size(images.shape[1:])}, job {self.first + 1}"
                f" is {_size(shape)}: images of one run have one size. Set it for all of them, or"
                " run once for each size.")
        place = self.all[job * self.batch:(job + 1) * self.batch]
        if place.shape == images.shape:
            place[...] = images
            images = place
        self.parts[job] = images

    def _allocate(self, images: numpy.ndarray) -> numpy.ndarray:
        """Returns an array for as many images of each job, whose memory the system gives as they
        come."""
        self.batch = len(images)
        free = psutil.virtual_memory().available
        size = images.nbytes * self.count
        if size > free:
            raise GraphError(
                f"{self.count} jobs of {_size(images.shape[1:])} take {size / 1e9:.1f} GB of memory"
                f" here, and {free / 1e9:.1f} GB are free: run fewer jobs, or smaller ones.")
        return numpy.empty((self.count * self.batch, *images.shape[1:]), numpy.float32)

    def in_order(self) -> numpy.ndarray:
        """Returns the images of all jobs, in the order of these."""
        parts = [self.parts[job] for job in range(self.count)]
        if all(part.base is self.all for part in parts):
            return self.all
        return numpy.concatenate(parts)


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width} x {height}" + (f" with {channels} channels" if channels != 3 else "")
