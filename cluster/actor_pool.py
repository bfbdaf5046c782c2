"""Actors of Ray that draw: how many fit on a machine, what each draws, and what is drawn again."""
import collections
import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .ray_connection import on_node

AHEAD = 2  # tasks that a worker has: one is drawn, one waits
GATHER_SECONDS = 0.02  # after an answer, for others: so a thousand workers are not asked each time
LOOK_SECONDS = 2.0  # between two looks at the nodes


@dataclass(frozen=True)
class Share:
    """What each worker gets of its machine."""
    cpus: float
    gpus: float = 0.0

    def room(self, machine: Mapping[str, float]) -> int:
        """For how many workers a machine, {"CPU": .., "GPU": ..}, has room.

        Where they take nothing, for as many as it has CPUs.
        """
        counts = [machine.get("GPU", 0) // self.gpus] if self.gpus else []
        if self.cpus or not self.gpus:
            counts.append(machine.get("CPU", 0) // (self.cpus or 1))
        return int(min(counts))

    def capacity(self) -> dict[str, int]:
        """Ray's nodes -> for how many workers each has room, of those that have any."""
        counts = {node: self.room(machine) for node, machine in machine_resources().items()}
        return {node: count for node, count in counts.items() if count}

    def free(self) -> dict[str, int]:
        """`capacity` without what is in use now."""
        from ray._private.state import available_resources_per_node

        nodes = available_resources_per_node()
        return {node: self.room(machine) for node, machine in nodes.items()}


def share_out(machines: Iterable[Mapping[str, float]], gpus: float | None = None,
              cpus: float | None = None, workers: int = 0) -> Share:
    """The share of each worker, alike on all machines, so that all have as many threads.

    Args:
        machines: {"CPU": .., "GPU": ..} of each.
        gpus: None for 1 where any machine has one.
        cpus: None for those of the smallest machine, shared out among its GPUs, or its workers.
        workers: how many there are to be, 0 for one on each GPU or else on each machine.
    """
    machines = list(machines)
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    if cpus is None:
        able = [machine for machine in machines if machine.get("GPU" if gpus else "CPU")]
        on_each = max(math.ceil(workers / max(len(able), 1)), 1)
        counts = [max(machine["GPU"] // gpus, 1) if gpus else on_each for machine in able]
        shares = [machine.get("CPU", 0) / count for machine, count in zip(able, counts)]
        cpus = min(shares, default=1.0)
        if cpus >= 1 or not gpus:
            cpus = max(cpus // 1, 1.0)
    return Share(cpus, gpus)


def machine_resources() -> dict[str, dict[str, float]]:
    """Ray's nodes that are alive -> what each has, as {"CPU": 8.0, "GPU": 1.0}."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


@dataclass(eq=False)
class PoolWorker:
    """A worker. calls: what Ray gave -> the call's task, None for `Worker.ready`; in their
    order."""
    actor: object
    node: str
    is_ready: bool = False
    calls: dict[object, dict | None] = field(default_factory=dict)


class ActorPool:
    """Workers, which stay until they are ended.

    Args:
        worker: their class.
        given: what it is made with.
        share: what each of them gets.
        threads: how many calls of one run at once.
    """

    def __init__(self, worker: type, given: Sequence, share: Share, threads: int = 1):
        import ray

        self.actor, self.given, self.share, self.threads = ray.remote(worker), given, share, threads
        self.members: list[PoolWorker] = []

    def start(self, node: str):
        options = {**on_node(node), "num_cpus": self.share.cpus, "num_gpus": self.share.gpus,
                   "max_concurrency": self.threads}
        actor = self.actor.options(**options).remote(*self.given)
        self.members.append(PoolWorker(actor, node, calls={actor.ready.remote(): None}))

    def end(self, member: PoolWorker):
        """Ends a worker, which may have ended already."""
        import ray

        self.members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)

    def end_all(self):
        for member in list(self.members):
            self.end(member)


class Run:
    """Draws tasks on the workers of a pool, as many as the nodes have room for.

    A subclass has

    - `begin(member, task)`, which has a worker draw a task and returns what Ray gave for the call;
    - `take(member, call, task)`, which takes what a call has answered, and drops it from
      `member.calls` when that was all;
    - `give_up(task, error)`: its workers have ended `LOSSES` times;
    - `never_starts(node, error)`: its workers have ended `FAILED_STARTS` times, one after another,
      while they started;
    - `unfit(node, name, reason)`: a worker there, on a machine of that name, cannot draw.

    Args:
        pool: where the workers are from.
        tasks: {"id", ...} each.
        workers: (fewest, most): no more than tasks, but `fewest` in any case; most: 0 for as many
            as fit.
    """
    WAIT_SECONDS = LOOK_SECONDS  # for answers, between two calls of `check`

    def __init__(self, pool: ActorPool, tasks: Iterable[dict], workers: tuple[int, int]):
        self.pool, self.workers = pool, workers
        self.waiting = collections.deque(tasks)
        self.returned: list[dict] = []  # to go to another worker
        self.left = len(self.waiting)
        self.excluded: set[str] = set()  # nodes that take no part
        self.losses = collections.Counter()  # id of a task -> workers that ended while they drew it
        self.failed_starts = collections.Counter()  # of nodes
        self.rests_until: dict[str, float] = {}  # node -> when it gets tasks again

    def draw(self):
        """Draws all tasks."""
        looked = -math.inf
        while self.left:
            self.check()
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look()
                looked = time.monotonic()
            self._assign()
            self._wait()

    # --- what a subclass may add ---

    def check(self):
        """Is called now and then, and may raise."""

    def look(self, usable: dict[str, int], has_excluded: bool):
        """Is called with the nodes that can draw, and whether there are others."""

    def lost(self, task: dict):
        """A task goes to another worker because its own has ended."""

    def next_task(self, node: str) -> dict | None:
        """Takes a task for a node from those that wait."""
        if self.returned:
            return self.returned.pop(0)
        return self.waiting.popleft() if self.waiting else None

    # --- the loop ---

    def _look(self):
        """Starts workers where there is room."""
        capacity = self.pool.share.capacity()
        usable = {node: room for node, room in capacity.items() if node not in self.excluded}
        self.look(usable, bool(capacity) and not usable)
        fewest, most = self.workers
        target = min(sum(usable.values()), max(self.left, fewest), most or math.inf)
        nodes = [member.node for member in self.pool.members]
        counts = collections.Counter(node for node in nodes if node in usable)
        free = self.pool.share.free() if counts.total() < target else {}
        while counts.total() < target:  # first where no other program is, and on all nodes alike
            node = min(usable, key=lambda node: (
                free.get(node, 0) <= 0, counts[node] / usable[node]))
            self.pool.start(node)
            counts[node] += 1
            free[node] = free.get(node, 0) - 1

    def _assign(self):
        """Gives each idle worker a task, and busy ones a second if others could not begin it."""
        now = time.monotonic()
        members = self.pool.members[:self.workers[1] or None]
        ready = [member for member in members
                 if member.is_ready and self.rests_until.get(member.node, 0) <= now]
        for held in range(AHEAD):
            idle = sum(not member.calls or not member.is_ready for member in members)
            for member in ready:
                if len(member.calls) != held:
                    continue
                if held and len(self.waiting) + len(self.returned) <= idle:
                    break
                if task := self.next_task(member.node):
                    member.calls[self.begin(member, task)] = task

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
                        self._take(member, call)

    def _take(self, member: PoolWorker, call):
        import ray

        task = member.calls[call]
        try:
            if task is None:
                self._greet(member, *ray.get(call))
                member.calls.pop(call)
            else:
                self.take(member, call, task)
        except ray.exceptions.RayError as error:  # the worker has ended, or its node
            self._lose(member, error)

    def _greet(self, member: PoolWorker, info: dict, unfit: str):
        if unfit:
            self.pool.end(member)
            self.unfit(member.node, info["name"], unfit.rstrip("."))
        else:
            member.is_ready, self.failed_starts[member.node] = True, 0

    def _lose(self, member: PoolWorker, error: Exception):
        """Hands on the tasks of an ended worker: the first it was drawing, others wait."""
        tasks = list(member.calls.values())
        self.pool.end(member)
        if not member.is_ready:
            self.failed_starts[member.node] += 1
            if self.failed_starts[member.node] == self.FAILED_STARTS:
                self.never_starts(member.node, error)
            return
        member.calls.clear()
        self.losses[tasks[0]["id"]] += 1
        if self.losses[tasks[0]["id"]] == self.LOSSES:
            self.give_up(tasks.pop(0), error)
        for task in tasks:
            self.lost(task)
        self.returned += tasks
