"""Starts and ends Ray actors that render, where they fit."""
import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ray_connection import on_node


@dataclass(frozen=True)
class Share:
    """The CPUs and GPUs that each worker gets of its machine."""
    cpus: float
    gpus: float = 0.0

    def worker_count(self, resources: Mapping[str, float]) -> int:
        """Returns how many workers fit on a machine.

        Workers that take neither CPUs nor GPUs are as many as the machine has CPUs.

        Args:
            resources: of the machine, {"CPU": 8.0, "GPU": 1.0}.
        """
        counts = [resources.get("GPU", 0) // self.gpus] if self.gpus else []
        if self.cpus or not self.gpus:
            counts.append(resources.get("CPU", 0) // (self.cpus or 1))
        return int(min(counts))

    def capacity(self) -> dict[str, int]:
        """Returns Ray's node id -> number of workers that fit, for nodes where any fit."""
        counts = {node: self.worker_count(resources)
                  for node, resources in machine_resources().items()}
        return {node: count for node, count in counts.items() if count}

    def free(self) -> dict[str, int]:
        """Returns Ray's node id -> number of workers that fit into what is not in use now.

        {} where Ray does not say it: all nodes count as equally busy then.
        """
        try:  # no public function of Ray has it by node
            from ray._private.state import available_resources_per_node
        except ImportError:
            return {}
        nodes = available_resources_per_node()
        return {node: self.worker_count(resources) for node, resources in nodes.items()}


def share_out(machines: Iterable[Mapping[str, float]], gpus: float | None = None,
              cpus: float | None = None, workers: int = 0) -> Share:
    """Returns the share of each worker, the same on all machines, so all have as many threads.

    Args:
        machines: resources of each, {"CPU": 8.0, "GPU": 1.0}.
        gpus: of a worker; None for 1 if any machine has one, else 0.
        cpus: of a worker; None for those of the smallest machine, divided by its GPUs or workers.
        workers: how many there will be, 0 for one on each GPU or else on each machine.
    """
    machines = list(machines)
    if gpus is None:
        gpus = 1.0 if any(resources.get("GPU") for resources in machines) else 0.0
    if cpus is None:
        able = [resources for resources in machines if resources.get("GPU" if gpus else "CPU")]
        on_each = max(math.ceil(workers / max(len(able), 1)), 1)
        counts = [max(resources["GPU"] // gpus, 1) if gpus else on_each for resources in able]
        shares = [resources.get("CPU", 0) / count for resources, count in zip(able, counts)]
        cpus = min(shares, default=1.0)
        if cpus >= 1 or not gpus:
            cpus = max(cpus // 1, 1.0)
    return Share(cpus, gpus)


def machine_resources() -> dict[str, dict[str, float]]:
    """Returns Ray's node id -> resources, {"CPU": 8.0, "GPU": 1.0}, of the nodes that are alive."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


@dataclass(eq=False)
class PoolWorker:
    """A worker of a pool.

    Args:
        actor: its handle.
        node: Ray's id of its node.
        is_ready: whether its ComfyUI has started.
        calls: Ray's reference -> its row, None for `Worker.ready`, oldest first.
    """
    actor: Any
    node: str
    is_ready: bool = False
    calls: dict[object, dict | None] = field(default_factory=dict)


class ActorPool:
    """Workers that stay from run to run until they are ended.

    Args:
        worker: their class.
        arguments: of its constructor.
        share: what each of them gets.
    """

    def __init__(self, worker: type, arguments: Sequence, share: Share):
        import ray

        self.actor = ray.remote(worker)
        self.arguments = arguments
        self.share = share
        self.members: list[PoolWorker] = []

    def start(self, node: str):
        options = {**on_node(node), "num_cpus": self.share.cpus, "num_gpus": self.share.gpus}
        actor = self.actor.options(**options).remote(*self.arguments)
        self.members.append(PoolWorker(actor, node, calls={actor.ready.remote(): None}))

    def end(self, member: PoolWorker):
        """Ends a worker, which may have ended already."""
        import ray.exceptions

        self.members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)

    def end_all(self):
        for member in list(self.members):
            self.end(member)
