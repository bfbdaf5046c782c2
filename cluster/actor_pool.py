"""Starts Ray actors that render, gives them tasks and repeats the tasks of those that end."""
import collections
import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .ray_connection import on_node

TASKS_PER_WORKER = 2  # one is rendered, one waits
GATHER_SECONDS = 0.02  # to collect further answers after one, instead of polling for each
NODE_POLL_SECONDS = 2.0  # between two queries of the cluster's nodes


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
        calls: Ray's reference or stream -> its task, None for `Worker.ready`, oldest first.
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
        threads: how many calls of one run at once.
    """

    def __init__(self, worker: type, arguments: Sequence, share: Share, threads: int = 1):
        import ray

        self.actor = ray.remote(worker)
        self.arguments = arguments
        self.share = share
        self.threads = threads
        self.members: list[PoolWorker] = []

    def start(self, node: str):
        options = {**on_node(node), "num_cpus": self.share.cpus, "num_gpus": self.share.gpus,
                   "max_concurrency": self.threads}
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


class Run:
    """Renders tasks on the workers of a pool, as many as fit on the nodes.

    Attributes:
        LOSSES: how many workers may end while they render a task before it is given up.
        FAILED_STARTS: how many workers of a node may end in a row while they start.

    Args:
        pool: its workers.
        tasks: {"id", ...} each.
        workers: (minimum, maximum); no more than there are tasks, but the minimum in any case.
            maximum 0: as many as fit.
    """
    LOSSES: int
    FAILED_STARTS: int
    WAIT_SECONDS = NODE_POLL_SECONDS  # for answers, between two calls of `check`

    def __init__(self, pool: ActorPool, tasks: Iterable[dict], workers: tuple[int, int]):
        self.pool = pool
        self.workers = workers
        self.waiting = collections.deque(tasks)
        self.returned: list[dict] = []  # for other workers, before those that wait
        self.remaining = len(self.waiting)
        self.excluded: set[str] = set()  # nodes that take no part
        self.losses = collections.Counter()  # task's id -> workers that ended while rendering it
        self.failed_starts = collections.Counter()  # by node, in a row
        self.paused_until: dict[str, float] = {}  # node -> time when it gets tasks again

    def render(self):
        """Renders all tasks."""
        polled = -math.inf
        while self.remaining:
            self.check()
            if time.monotonic() - polled > NODE_POLL_SECONDS:
                self._start_workers()
                polled = time.monotonic()
            self._assign()
            self._wait()

    # --- what a subclass defines ---

    def start_task(self, member: PoolWorker, task: dict) -> object:
        """Starts a task on a worker and returns what Ray returned."""
        raise NotImplementedError

    def on_answer(self, member: PoolWorker, call: Any, task: dict):
        """Takes what a call has answered, and drops it from `member.calls` when that was all."""
        raise NotImplementedError

    def give_up(self, task: dict, error: Exception):
        """Is called when `LOSSES` workers have ended while they rendered the task."""
        raise NotImplementedError

    def on_failed_starts(self, node: str, error: Exception):
        """Is called when `FAILED_STARTS` workers of a node have ended while they started."""
        raise NotImplementedError

    def on_unusable(self, node: str, name: str, reason: str):
        """Is called when a worker on a machine of that name cannot render."""
        raise NotImplementedError

    # --- what a subclass may override ---

    def check(self):
        """Is called now and then, and may raise to end the run."""

    def on_capacity(self, usable: dict[str, int], has_excluded: bool):
        """Is called every few seconds.

        Args:
            usable: Ray's id -> number of workers that fit, of the nodes that are not excluded.
            has_excluded: whether there are nodes but all are excluded.
        """

    def on_lost(self, task: dict):
        """Is called when a task goes to another worker because its own has ended."""

    def next_task(self, node: str) -> dict | None:
        """Takes a task for a node from those that wait."""
        if self.returned:
            return self.returned.pop(0)
        return self.waiting.popleft() if self.waiting else None

    # --- the loop ---

    def _start_workers(self):
        """Starts workers where they fit, first where no other program runs, and spread evenly."""
        capacity = self.pool.share.capacity()
        usable = {node: count for node, count in capacity.items() if node not in self.excluded}
        self.on_capacity(usable, bool(capacity) and not usable)
        minimum, maximum = self.workers
        target = min(sum(usable.values()), max(self.remaining, minimum), maximum or math.inf)
        nodes = [member.node for member in self.pool.members]
        counts = collections.Counter(node for node in nodes if node in usable)
        free = self.pool.share.free() if counts.total() < target else {}
        while counts.total() < target:
            node = min(usable, key=lambda node: (
                free.get(node, 0) <= 0, counts[node] / usable[node]))
            self.pool.start(node)
            counts[node] += 1
            free[node] = free.get(node, 0) - 1

    def _assign(self):
        """Gives each idle worker a task, and a busy one a second that no idle one can begin."""
        now = time.monotonic()
        members = self.pool.members[:self.workers[1] or None]
        ready = [member for member in members
                 if member.is_ready and self.paused_until.get(member.node, 0) <= now]
        for busy_with in range(TASKS_PER_WORKER):
            idle = sum(not member.calls or not member.is_ready for member in members)
            for member in ready:
                if len(member.calls) != busy_with:
                    continue
                if busy_with and len(self.waiting) + len(self.returned) <= idle:
                    break
                if task := self.next_task(member.node):
                    member.calls[self.start_task(member, task)] = task

    def _wait(self):
        """Waits for answers, and takes all that have come."""
        import ray

        calls = [call for member in self.pool.members for call in member.calls]
        if not calls:
            time.sleep(min(self.WAIT_SECONDS, 0.5))
            return
        if ray.wait(calls, timeout=self.WAIT_SECONDS)[0]:
            answered = set(ray.wait(calls, num_returns=len(calls), timeout=GATHER_SECONDS)[0])
            for member in list(self.pool.members):
                for call in [call for call in member.calls if call in answered]:
                    if call in member.calls:
                        self._take_answer(member, call)

    def _take_answer(self, member: PoolWorker, call):
        import ray.exceptions

        task = member.calls[call]
        try:
            if task is None:
                self._on_ready(member, *ray.get(call))
                member.calls.pop(call)
            else:
                self.on_answer(member, call, task)
        except ray.exceptions.RayError as error:  # the worker or its node has ended
            self._on_end(member, error)

    def _on_ready(self, member: PoolWorker, info: dict, problem: str):
        if problem:
            self.pool.end(member)
            self.on_unusable(member.node, info["name"], problem.rstrip("."))
        else:
            member.is_ready = True
            self.failed_starts[member.node] = 0

    def _on_end(self, member: PoolWorker, error: Exception):
        """Returns an ended worker's tasks. A loss is counted for the first, which it rendered."""
        tasks = [task for task in member.calls.values() if task is not None]
        self.pool.end(member)
        if not member.is_ready:
            self.failed_starts[member.node] += 1
            if self.failed_starts[member.node] == self.FAILED_STARTS:
                self.on_failed_starts(member.node, error)
            return
        member.calls.clear()
        self.losses[tasks[0]["id"]] += 1
        if self.losses[tasks[0]["id"]] == self.LOSSES:
            self.give_up(tasks.pop(0), error)
        for task in tasks:
            self.on_lost(task)
        self.returned += tasks
