"""A batch: rows of changes to one workflow -> pictures in a folder or bucket, drawn by actors of Ray."""
import collections
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import by_value
from .check import checked
from .fetch import pinned
from .joining import ALONE, is_joined, join, local_environment, nearest
from .place import MachineError, arguments, difference, find, majority, versions
from .progress import Progress
from .row_pool import RowPool
from .row_renderer import RowRenderer
from .rows import Table, changes_of, chunks, lines, look
from .store import Store, StoreActor
from .worker import node_info

LOCAL_SCAN_ROWS = 20_000  # up to which the scan is quicker in this process than in tasks
CHUNK = 5_000  # rows in one task of the scan
VERSION_SECONDS = 60  # that a machine has to say its versions


class BatchError(Exception):
    """Why nothing can be drawn, and what to do, in one sentence."""


@dataclass
class Batch:
    """What is to be drawn, and on what.

    Args:
        graph: the workflow.
        rows: path of the lines.
        out: see `Store`.
        workers: (fewest, most), 0: as many as fit.
        gpus, cpus: of each worker, None: by what the machines have, see `share`.
        address: of the cluster.
        shard: (i, n).
        comfyui: this command's own ComfyUI, or "".
        say: as print.
        worker: what draws a row.
    """
    graph: dict
    rows: str
    out: str
    workers: tuple[int, int] = (1, 0)
    gpus: float | None = None
    cpus: float | None = None
    address: str = "auto"
    shard: tuple[int, int] = (1, 1)
    comfyui: str = ""
    say: object = print
    worker: type = RowRenderer

    def run(self) -> collections.Counter:
        """Draws what is not there yet.

        Returns:
            How many rows were "there", "drawn", and "failed" (of the lines that are no rows too).

        Raises:
            BatchError, OSError, ValueError
        """
        self.store = Store(self.out)
        table = self.scan()
        for number, reason in table.bad:
            self.say(f"Line {number} {reason.rstrip('.')}.", flush=True)
        counts = collections.Counter({"there": table.there, "failed": len(table.bad)})
        if table.left:
            try:
                counts += self.render([{"id": name, "changes": text, "stamp": stamp} for name, text, stamp, _ in table.left])
            except KeyboardInterrupt:
                if is_joined():
                    sys.modules["ray"].shutdown()  # ends the workers, which may be writing
                raise
            finally:
                self.store.tidy(table.names)
        return +counts

    def checked(self, send: bool = False) -> bool:
        """Say of each machine what it is and lacks, after it was sent missing model files if `send`. Whether all can run it.

        Raises BatchError.
        """
        self.connect()
        nodes = {node: bool(self.gpus) for node in self.capacity()}
        if not nodes:
            raise BatchError(self.no_capacity())
        return checked(nodes, self.comfyui, self.graph, changes_of(self.rows), send, lambda text: self.say(text, flush=True))

    # --- what is there ---

    def scan(self) -> Table:
        table, rows = Table(self.shard), lines(self.rows)
        scans = [look(self.out, self.graph, next(chunks(rows, LOCAL_SCAN_ROWS), []))]
        rest = chunks(rows, CHUNK)
        if first := next(rest, None):
            self.connect()
            scans += self.scan_on_ray(itertools.chain([first], rest))
        for each in scans:
            table.add(each)
        self.store.tidy(table.names)
        return table

    def scan_on_ray(self, parts: Iterator[list]) -> list:
        """Scans lines, as many parts at once as there are processors where the store is, in their order."""
        import ray

        where = {"num_cpus": 0, "scheduling_strategy": "SPREAD"} if self.store.files else pinned(self.home)
        at_once = int(ray.cluster_resources().get("CPU", 1)) if self.store.files else os.cpu_count()
        task, graph = ray.remote(look).options(**where), ray.put(self.graph)
        scans, running = [], collections.deque()
        for part in parts:
            if len(running) > at_once:
                scans.append(ray.get(running.popleft()))
            running.append(task.remote(self.out, graph, part))
        return scans + ray.get(list(running))

    # --- the cluster ---

    def connect(self):
        """Joins the cluster, or starts one of this machine. Raises BatchError."""
        try:
            if not is_joined():
                address = nearest(self.address)
                os.environ.setdefault(ALONE, "0")
                if address == "local":
                    os.environ.update(local_environment(os.environ))
                join(address)
            import ray
        except ImportError as error:
            raise BatchError(f"Ray is missing ({error}). Install it for this Python: {sys.executable} -m pip install ray"
                             ) from error
        except MachineError as error:
            raise BatchError(str(error)) from error
        by_value(ray.cloudpickle)
        self.home = ray.get_runtime_context().get_node_id()
        self.gpus, self.cpus = share(self.resources().values(), self.gpus, self.cpus)

    def resources(self) -> dict[str, dict[str, float]]:
        """Ray's nodes that are alive -> what each has, as {"CPU": 8.0, "GPU": 1.0}."""
        import ray

        return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def capacity(self) -> dict[str, int]:
        """Nodes -> for how many workers each has room, of those that have any."""
        counts = {node: room(resources, self.gpus, self.cpus) for node, resources in self.resources().items()}
        return {node: count for node, count in counts.items() if count}

    def no_capacity(self) -> str:
        gpus = f" and {self.gpus:g} GPUs: give --gpus 0 for machines without." if self.gpus else ""
        return f"No machine of the cluster has {self.cpus:g} free CPUs{gpus}"

    def common_versions(self) -> tuple[dict[str, str], set[str]]:
        """Compares the machines, and says which take no part. Starts no ComfyUI.

        Returns:
            (`versions` that most machines have, the nodes that have others).

        Raises:
            BatchError: no machine can take part.
        """
        import ray

        task = ray.remote(versions_here)
        nodes = {task.options(**pinned(node)).remote(self.comfyui): node for node in self.capacity()}
        ready, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=VERSION_SECONDS) if nodes else ([], [])
        answers = {}
        for ref in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                answers[nodes[ref]] = ray.get(ref)
        expected = majority((here for _, here, problem in answers.values() if not problem),
                            versions(self.comfyui) if self.comfyui else None)
        if not expected:
            raise BatchError("; ".join(f"{name} {problem}" for name, _, problem in answers.values()) or self.no_capacity())
        excluded = set()
        for node, (name, here, problem) in answers.items():
            if reason := problem or difference(here, expected):
                excluded.add(node)
                self.say(f"{name} {reason.rstrip('.')}: it takes no part.", flush=True)
        return expected, excluded

    # --- drawing ---

    def render(self, rows: list[dict]) -> collections.Counter:
        """Draws rows, {"id", "changes", "stamp"}, and counts them by their end."""
        self.connect()
        import ray

        expected, excluded = self.common_versions()
        writer = None
        if not self.store.files and not self.out.startswith("file://"):
            writer = ray.remote(StoreActor).options(max_restarts=-1, max_task_retries=-1, max_concurrency=16,
                                                    **pinned(self.home)).remote(self.out)
        actor = ray.remote(self.worker)
        given = (self.graph, self.out, self.home if writer else "", writer, self.comfyui, expected)

        def start(node: str):
            return actor.options(**{**pinned(node), "num_cpus": self.cpus, "num_gpus": self.gpus}).remote(*given)

        progress = Progress(len(rows), self.say)
        RowPool(start, self.capacity, excluded, self.workers, progress).render(rows)
        return progress.counts


def share(machines, gpus: float | None, cpus: float | None) -> tuple[float, float]:
    """(GPUs, CPUs) of each worker.

    Args:
        machines: {"CPU": ..., "GPU": ...} of each.
        gpus: None for 1 where any machine has one.
        cpus: None for all of the smallest machine, shared out among its GPUs.
    """
    machines = list(machines)
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    if cpus is None:
        shares = [machine.get("CPU", 0) // max(machine["GPU"] // gpus if gpus else 1, 1)
                  for machine in machines if machine.get("GPU" if gpus else "CPU")]
        cpus = max(min(shares, default=1.0), 1.0)
    return gpus, cpus


def room(machine: dict[str, float], gpus: float, cpus: float) -> int:
    """For how many workers a machine has room; where they take no CPU, as many as it has CPUs."""
    count = machine.get("CPU", 0) // (cpus or 1)
    return int(min(count, machine.get("GPU", 0) // gpus) if gpus else count)


def versions_here(comfyui: str) -> tuple[str, dict[str, str], str]:
    """(this machine's name, `versions`, what keeps it from taking part)."""
    name = node_info()["name"]
    try:
        return name, versions(find(comfyui), arguments(True)), ""
    except MachineError as error:
        return name, {}, str(error)
