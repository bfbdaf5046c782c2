"""Pictures of items that are drawn on other machines, put together in their order, and how far they
are."""
import math
from collections.abc import Collection

import numpy
import psutil

from .comfyui_install import MachineError
from .graph import GraphError, one_line

MAX_STEPS = 1 << 40  # of a node


class ImageCollector:
    """Takes the events of `DriverPool.run`.

    Args:
        count: how many items there are.
        nodes: those whose steps count.
    """

    def __init__(self, count: int, nodes: Collection[str]):
        self.count, self.nodes = count, nodes
        # item -> the machine that draws it; item -> node -> its steps
        self.on, self.steps, self.workers = {}, {}, 0
        # of all items, `batch` each; items with another number of pictures
        self.images, self.batch, self.others = None, 0, {}
        self.received, self.done = {}, set()

    def tell(self, header: dict, data: bytes):
        """Takes a header of the driver and its data.

        Raises GraphError and MachineError for an item that cannot be drawn, or not next to the
        others, and MachineError for what is no event.
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
        index, value = header["item"], header.get("value")
        name = f"Item {index + 1} of {self.count}"
        if event == "begins":
            self.on[index] = value
        elif event == "lost":
            self.on.pop(index, None)
            self.steps.pop(index, None)
            self.received.pop(index, None)
        elif event == "progress":
            node, done, most = value
            if node in self.nodes and most > 1:
                self.steps.setdefault(index, {})[node] = done, most
        elif event == "failed":
            raise GraphError(f"{name} failed: {value}")
        elif event == "unfit":
            raise MachineError(f"{name} cannot be drawn on {value}")
        elif event == "image":
            self._put(name, header, data)

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
                "value": [str(), int() | float() as done,
                          int() | float() as most]
            }:
                return 0 <= done <= MAX_STEPS and 0 <= most <= MAX_STEPS
            case {"event": "begins" | "failed" | "unfit", "value": str()}:
                return True
        return event in ("lost", "preview")

    def _put(self, name: str, header: dict, data: bytes):
        item, index, count, shape = (
            header["item"],
            header["index"],
            header["of"],
            tuple(header["shape"]),
        )
        if self.images is None:
            self._allocate(count, shape)
            self.first = item
        if shape != self.images.shape[1:]:
            raise GraphError(
                f"{name} is {_size(shape)}, item {self.first + 1} is"
                f" {_size(self.images.shape[1:])}: pictures of one run have one size. Set it for"
                " all of them, or run once for each size.")
        if count == self.batch:
            target = self.images[item * count + index]
        else:
            if len(self.others.get(item, ())) != count:
                self.others[item] = _empty((count, *shape))
            target = self.others[item][index]
        target[...] = numpy.frombuffer(data, numpy.float32).reshape(shape)
        self.received[item] = self.received.get(item, 0) + 1
        if self.received[item] == count:
            self.done.add(item)

    def _allocate(self, batch: int, shape: tuple[int, ...]):
        """Makes room for all pictures. Memory is used as they come."""
        size, free = 4 * math.prod(shape) * batch * self.count, psutil.virtual_memory().available
        if size > free:
            raise GraphError(
                f"{self.count} items of {_size(shape)} take {size / 1e9:.1f} GB of memory here, and"
                f" {free / 1e9:.1f} GB are free: draw fewer at once, or smaller ones.")
        self.images, self.batch = _empty((batch * self.count, *shape)), batch

    def whole(self) -> numpy.ndarray:
        """The pictures of all items, (N, H, W, C). Raises GraphError where an item has none."""
        missing = next((index for index in range(self.count) if index not in self.done), None)
        if missing is not None:
            raise GraphError(f"Item {missing + 1} of {self.count} gave no picture.")
        if not self.others:
            return self.images
        parts = numpy.split(self.images, self.count)
        return numpy.concatenate([self.others.get(index, part) for index, part in enumerate(parts)])

    def progress(self) -> tuple[int, int]:
        """(steps done, steps in all). An item that has not told its steps is taken to have as many
        as the longest that has."""
        sums = {
            index: (sum(value
                        for value, _ in steps.values()), sum(most for _, most in steps.values()))
            for index, steps in self.steps.items()
        }
        most = max((total for _, total in sums.values()), default=1)
        done = sum(most if index in self.done else min(sums.get(index, (0, 0))[0], most)
                   for index in range(self.count))
        return int(done), int(most * self.count)

    def text(self) -> str:
        """What the node shows."""
        if not self.on:
            return (
                "Waiting for Ray"
                if not self.workers
                else f"Waiting for workers, {self.workers} at most"
            )
        machines = sorted(set(self.on.values()))
        drawing = len(self.on.keys() - self.done)
        return f"{len(self.done)} of {self.count} done, {drawing} in work\non {', '.join(machines)}"


def _empty(shape: tuple[int, ...]) -> numpy.ndarray:
    try:
        return numpy.empty(shape, numpy.float32)
    except (MemoryError, ValueError) as error:
        raise GraphError(
            f"{shape[0]} pictures of {_size(shape[1:])} are more than the memory here holds: draw"
            " fewer at once, or smaller ones.") from error


def _size(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{width} x {height}" + (f" with {channels} channels" if channels != 3 else "")
