"""Pictures of items that are drawn elsewhere, put together in their order, and how far they are."""
from collections.abc import Collection

from .graph import GraphError
from .place import MachineError


class Gathering:
    """images: item -> array (N, H, W, C), float32. on: item -> the machine that draws it. nodes: those whose steps count."""

    def __init__(self, count: int, nodes: Collection[str]):
        self.count, self.nodes = count, nodes
        self.images, self.on, self.steps, self.workers = {}, {}, {}, 0

    def tell(self, event, data):
        """Take an event of `Pool.run`. Raises GraphError and MachineError for an item that cannot be drawn, or not beside the
        others."""
        if event == "workers":
            self.workers = data
            return
        index, kind = event
        which = f"Item {index + 1} of {self.count}"
        if kind == "begins":
            self.on[index] = data
        elif kind == "lost":
            self.on.pop(index, None)
            self.steps.pop(index, None)
        elif kind == "progress":
            node, value, maximum = data
            if node in self.nodes and maximum > 1:
                self.steps.setdefault(index, {})[node] = value, maximum
        elif kind == "failed":
            raise GraphError(f"{which} failed: {data}")
        elif kind == "unfit":
            raise MachineError(f"{which} cannot be drawn on {data}")
        elif kind == "images":
            other = next(iter(self.images.items()), (index, data))
            if other[1].shape[1:] != data.shape[1:]:
                raise GraphError(f"{which} is {_size(data)}, item {other[0] + 1} is {_size(other[1])}: pictures of one run have"
                                 " one size. Set it for all of them, or run once for each size.")
            self.images[index] = data

    def progress(self) -> tuple[int, int]:
        """(steps done, steps in all). An item that has not told its steps is taken to have as many as the longest that has."""
        sums = {index: (sum(value for value, _ in steps.values()), sum(most for _, most in steps.values()))
                for index, steps in self.steps.items()}
        most = max((total for _, total in sums.values()), default=1)
        done = sum(most if index in self.images else min(sums.get(index, (0, 0))[0], most) for index in range(self.count))
        return int(done), int(most * self.count)

    def text(self) -> str:
        """What the node shows."""
        if not self.on:
            return "Waiting for Ray" if not self.workers else f"Waiting for workers, {self.workers} at most"
        machines = sorted(set(self.on.values()))
        drawing = len(self.on.keys() - self.images.keys())
        return f"{len(self.images)} of {self.count} done, {drawing} in work\non {', '.join(machines)}"


def _size(images) -> str:
    return f"{images.shape[2]} x {images.shape[1]}" + (f" with {images.shape[3]} channels" if images.shape[3] != 3 else "")
