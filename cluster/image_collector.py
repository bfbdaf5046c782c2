"""Collects the images that workers render, in the order of their items, and tracks progress."""
import math
import time
from collections.abc import Collection
from typing import Any

import numpy
import psutil

from .batch_progress import duration
from .comfyui_install import MachineError
from .workflow_graph import GraphError, one_line

MAX_STEPS = 1 << 40  # of a node; more are not an event


class ImageCollector:
    """Collects images and progress from the events of `DriverPool.run`.

    Args:
        count: how many items there are.
        nodes: those whose steps count as progress.
    """

    def __init__(self, count: int, nodes: Collection[str]):
        self.count = count
        self.nodes = nodes
        self.workers = 0
        self.started = 0.0  # when the first item began
        self.machines: dict[int, str] = {}  # item -> name of the machine that renders it
        self.steps: dict[int, dict[str, tuple]] = {}  # item -> node -> (steps done, steps in all)
        self.images: numpy.ndarray | None = None  # of all items, `batch` each, (N, H, W, C)
        self.batch = 0
        self.other_batches: dict[int, numpy.ndarray] = {}  # items with another number of images
        self.received: dict[int, int] = {}  # item -> number of images that have come
        self.done: set[int] = set()  # items whose images have all come

    def receive(self, header: dict, data: bytes):
        """Takes an event of the driver.

        Args:
            header: of the message, see `Driver.run`.
            data: float32 values of an image.

        Raises:
            GraphError: the workflow is wrong, or its images have several sizes.
            MachineError: a machine cannot render it, or the event cannot be read.
        """
        if not self._is_event(header, data):
            raise MachineError(
                f"Ray's driver sent an event that cannot be read: {one_line(header, 200)}. Run"
                " again."
            )
        event = header["event"]
        if event == "workers":
            self.workers = header["value"]
            return
        index: int = header["item"]
        value: Any = header.get("value")
        name = f"Job {index + 1} of {self.count}"
        if event == "begins":
            self.started = self.started or time.monotonic()
            self.machines[index] = value
        elif event == "lost":
            self.machines.pop(index, None)
            self.steps.pop(index, None)
            self.received.pop(index, None)
        elif event == "progress":
            node, done, total = value
            if node in self.nodes and total > 1:
                self.steps.setdefault(index, {})[node] = done, total
        elif event == "failed":
            raise GraphError(f"{name} failed: {value}")
        elif event == "unusable":
            raise MachineError(f"{name} cannot run on {value}")
        elif event == "image":
            self._add_image(name, header, data)

    def _is_event(self, header: dict, data: bytes) -> bool:
        match header:
            case {"event": "workers", "value": int(count)}:
                return count >= 0
            case {"event": str(event), "item": int(item)} if 0 <= item < self.count:
                pass
            case _:
                return False
        match header:
            case {
                "event": "image", "index": int(index), "of": int(count),
                "shape": [int(height), int(width), int(channels)]
            }:
                return (0 <= index < count and min(height, width, channels) > 0
                        and len(data) == 4 * height * width * channels)
            case {
                "event": "progress",
                "value": [str(), int() | float() as done, int() | float() as total]
            }:
                return 0 <= done <= MAX_STEPS and 0 <= total <= MAX_STEPS
            case {"event": "begins" | "failed" | "unusable", "value": str()}:
                return True
        return event in ("lost", "preview")

    def _add_image(self, name: str, header: dict, data: bytes):
        item = header["item"]
        index = header["index"]
        count = header["of"]
        shape = tuple(header["shape"])
        images = self.images
        if images is None:
            images = self.images = self._allocate(count, shape)
            self.first = item
        if shape != images.shape[1:]:
            raise GraphError(
                f"{name} is {_size(shape)}, job {self.first + 1} is"
                f" {_size(images.shape[1:])}: images of one run have one size. Set it for"
                " all of them, or run once for each size.")
        if count == self.batch:
            target = images[item * count + index]
        else:
            if len(self.other_batches.get(item, ())) != count:
                self.other_batches[item] = _empty((count, *shape))
            target = self.other_batches[item][index]
        target[...] = numpy.frombuffer(data, numpy.float32).reshape(shape)
        self.received[item] = self.received.get(item, 0) + 1
        if self.received[item] == count:
            self.done.add(item)

    def _allocate(self, batch: int, shape: tuple[int, ...]) -> numpy.ndarray:
        """Allocates the array of all images, whose memory the system gives as they come."""
        size = 4 * math.prod(shape) * batch * self.count
        free = psutil.virtual_memory().available
        if size > free:
            raise GraphError(
                f"{self.count} jobs of {_size(shape)} take {size / 1e9:.1f} GB of memory here, and"
                f" {free / 1e9:.1f} GB are free: run fewer jobs, or smaller ones.")
        self.batch = batch
        return _empty((batch * self.count, *shape))

    def all_images(self) -> numpy.ndarray:
        """Returns the images of all items, float32 (N, H, W, C).

        Raises:
            GraphError: an item has none.
        """
        missing = next((index for index in range(self.count) if index not in self.done), None)
        if missing is not None:
            raise GraphError(f"Job {missing + 1} of {self.count} gave no image.")
        assert self.images is not None  # all items are done
        if not self.other_batches:
            return self.images
        parts = numpy.split(self.images, self.count)
        return numpy.concatenate(
            [self.other_batches.get(index, part) for index, part in enumerate(parts)])

    def progress(self) -> tuple[int, int]:
        """Returns (steps done, steps in all). Every item counts as many steps as the longest."""
        done = {index: sum(count for count, _ in steps.values())
                for index, steps in self.steps.items()}
        totals = (sum(total for _, total in steps.values()) for steps in self.steps.values())
        longest = max(totals, default=1)
        done_in_all = sum(longest if index in self.done else min(done.get(index, 0), longest)
                          for index in range(self.count))
        return int(done_in_all), int(longest * self.count)

    def status_text(self) -> str:
        """Returns the text on the node."""
        if not self.workers and not self.machines:
            return "Waiting for Ray"
        if not self.machines:
            return f"Waiting for workers, {self.workers} at most"
        names = ", ".join(sorted(set(self.machines.values())))
        running = len(self.machines.keys() - self.done)
        text = f"{len(self.done)} of {self.count} done, {running} running"
        steps, total = self.progress()
        if self.done and steps < total:
            seconds = (time.monotonic() - self.started) * (total - steps) / steps
            text += f", {duration(seconds)} left"
        return f"{text}\non {names}"


def _empty(shape: tuple[int, ...]) -> numpy.ndarray:
    """Returns a new float32 array. Raises GraphError."""
    try:
        return numpy.empty(shape, numpy.float32)
    except (MemoryError, ValueError) as error:
        raise GraphError(
            f"{shape[0]} images of {_size(shape[1:])} are more than the memory here holds: run"
            " fewer jobs, or smaller ones.") from error


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width} x {height}" + (f" with {channels} channels" if channels != 3 else "")
