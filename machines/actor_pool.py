"""The workers of one editor: actors of Ray that start with a run, stay for the next one and end when nothing comes."""
import asyncio
import collections
import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .graph import changed, one_line
from .joining import on_node
from .place import MachineError
from .worker import PromptWorker

AHEAD = 2  # items that a worker holds while there are more than idle workers: one is drawn, one waits
ATTEMPTS = 3  # times that an item, or a worker that starts, may be lost


@dataclass(frozen=True)
class Share:
    """What each worker gets. per_node: how many workers on a machine without GPUs, 0 for those with GPUs."""
    cpus: float
    gpus: float = 0
    per_node: int = 0


@dataclass(eq=False)
class Member:
    """A worker. node: Ray's id of its machine, where it was chosen here. drawing: item -> id of its prompt."""
    actor: object
    node: str = ""
    is_ready: bool = False
    drawing: dict[int, str] = field(default_factory=dict)


def plan(machines: Sequence[dict[str, float]], workers: int = 0, on_cpu: bool = False) -> tuple[int, Share]:
    """How many workers there are, and what each of them gets.

    The CPUs of a machine are shared out among its workers, alike on all machines, so that all compute with the same number of
    threads.

    Args:
        machines: {"CPU": .., "GPU": ..} of each.
        workers: 0 for one on each GPU, or on each machine where none has a GPU.
        on_cpu: whether GPUs are left unused.
    """
    gpus = [] if on_cpu else [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if gpus:
        threads = min(machine.get("CPU", 0) / machine["GPU"] for machine in gpus)
        most = int(sum(machine["GPU"] for machine in gpus))
        return min(workers or most, most), Share(int(threads) if threads >= 1 else threads, 1)
    with_cpus = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not with_cpus:
        return 0, Share(0)
    count = min(workers or len(with_cpus), sum(with_cpus))
    per_node = -(-count // len(with_cpus))
    return count, Share(max(1, min(with_cpus) // per_node), per_node=per_node)


class ActorPool:
    """comfyui: where ComfyUI is on machines that do not name one."""

    def __init__(self, comfyui: str = ""):
        self.comfyui, self.members, self.share, self.timer = comfyui, [], None, None

    def take(self, count: int, share: Share) -> list[Member]:
        """So many workers with this share; those that are there come first."""
        if self.timer:
            self.timer.cancel()
        if share != self.share:
            self.end_all()
        self.share = share
        self.members.sort(key=lambda member: not member.is_ready)
        while len(self.members) < count:
            self.start()
        return self.members[:count]

    def start(self) -> Member:
        import ray

        options, node = {"scheduling_strategy": "SPREAD"}, ""
        if self.share.per_node:  # no resource of Ray says that a machine shall have no more
            alive = [each["NodeID"] for each in ray.nodes() if each["Alive"] and each["Resources"].get("CPU", 0) >= 1]
            counts = collections.Counter(member.node for member in self.members)
            node = min(alive, key=counts.__getitem__, default="")
            options = on_node(node) if node else options
        options |= {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_concurrency": 64}
        actor = ray.remote(PromptWorker).options(**options).remote(self.comfyui)
        member = Member(actor, node)
        self.members.append(member)
        return member

    def end(self, member: Member):
        """Ends a worker, which may have ended already."""
        import ray

        with contextlib.suppress(ValueError):
            self.members.remove(member)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(member.actor)

    def end_all(self):
        for member in list(self.members):
            self.end(member)

    def end_later(self, seconds: float):
        """Ends the workers after so many seconds without a run."""
        self.timer = asyncio.get_running_loop().call_later(seconds, self.end_all)


class Run:
    """The items of one run on workers.

    Args:
        pool: where the workers are from.
        graph: the workflow; changes: for each item its changes to it; extra: see `Host.run`.
        tell: is called with (item, event, data), the events of `PromptWorker.draw` and ("lost", None) for an item that goes to
            another worker because its own has ended.
    """

    def __init__(self, pool: ActorPool, graph: dict, changes: Sequence[dict], extra: dict, tell: Callable):
        self.pool, self.graph, self.changes, self.extra, self.tell = pool, graph, changes, extra, tell
        self.waiting, self.left = collections.deque(range(len(changes))), len(changes)
        self.losses, self.failed_starts = collections.Counter(), 0
        self.members, self.tasks, self.ended = [], set(), None

    async def run(self, count: int, share: Share):
        """Draws all items on so many workers. When it raises or is cancelled, no item goes on. Raises MachineError."""
        self.ended = asyncio.get_running_loop().create_future()
        try:
            for member in self.pool.take(count, share):
                self.add(member)
            self.assign()
            await self.ended
        finally:
            for member in self.members:
                for prompt_id in member.drawing.values():
                    member.actor.cancel.remote(prompt_id)
                member.drawing.clear()
            for task in self.tasks:
                task.cancel()

    def add(self, member: Member):
        self.members.append(member)
        if not member.is_ready:
            self.spawn(self.await_ready(member))

    def spawn(self, work):
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._after)

    def _after(self, task: asyncio.Task):
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() and not self.ended.done():
            self.ended.set_exception(task.exception())

    async def await_ready(self, member: Member):
        from ray.exceptions import RayError, RayTaskError

        try:
            info, unfit = await member.actor.ready.remote()
        except RayTaskError:
            raise
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts == ATTEMPTS:
                raise MachineError(f"A worker ended {ATTEMPTS} times while its ComfyUI started: a machine may lack memory. Ray"
                                   f" says: {one_line(error, 300)}") from error
            self.replace(member)
            return
        if unfit:  # one that starts later may find it mended
            self.pool.end(member)
            self.members.remove(member)
            self.tell(self.waiting[0] if self.waiting else 0, "unfit", f"{info['name']}: {unfit}")
            return
        member.is_ready = True
        self.assign()

    def replace(self, member: Member):
        self.pool.end(member)
        if member in self.members:
            self.members.remove(member)
            self.add(self.pool.start())

    def assign(self):
        """Gives items to workers; none gets a second one that a worker without any could draw."""
        idle = sum(not member.drawing for member in self.members)
        while self.waiting:
            ready = [member for member in self.members if member.is_ready and len(member.drawing) < AHEAD]
            member = min(ready, key=lambda member: len(member.drawing), default=None)
            if member is None or member.drawing and len(self.waiting) <= idle:
                return
            idle -= not member.drawing
            item = self.waiting.popleft()
            member.drawing[item] = str(uuid.uuid4())
            self.spawn(self.draw(member, item))

    async def draw(self, member: Member, item: int):
        from ray.exceptions import RayError, RayTaskError

        try:
            stream = member.actor.draw.options(num_returns="streaming").remote(
                changed(self.graph, self.changes[item]), self.extra, member.drawing[item])
            async for ref in stream:
                self.tell(item, *await ref)
        except RayTaskError:
            raise
        except RayError as error:  # the actor, its machine or an object of it is gone
            self.losses[item] += 1
            if self.losses[item] == ATTEMPTS:
                raise MachineError(
                    f"Item {item + 1} was lost {ATTEMPTS} times, as its worker ended each time: a machine may lack memory."
                    f" Ray says: {one_line(error, 300)}") from error
            self.tell(item, "lost", None)
            self.waiting.appendleft(item)
            self.replace(member)
        else:
            self.left -= 1
            if not self.left and not self.ended.done():
                self.ended.set_result(None)
        del member.drawing[item]
        self.assign()
