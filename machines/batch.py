"""A batch: rows of changes to one workflow -> pictures in a folder or bucket, drawn by actors of Ray."""
import collections
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import by_value
from .check import Machine, check_machines, file_changes, report
from .joining import ALONE, is_joined, join, local_environment, nearest, on_node
from .place import MachineError, arguments, difference, find, majority, versions
from .progress import Progress
from .row_pool import RowPool
from .rows import Table, changes_of, chunks, lines, look
from .store import Store, StoreActor
from .worker import RowRenderer, node_info

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

    def check(self) -> bool:
        """Says of each machine what it is and lacks. Returns whether all can run it. Raises BatchError, OSError."""
        self.connect()
        machines, _ = self.compare_machines()
        for node in self.capacity().keys() - machines.keys():
            machines[node] = Machine(f"Ray's node {node[:8]}", {}, f"did not answer within {VERSION_SECONDS} s")
        changes = file_changes(self.graph, changes_of(self.rows))
        check_machines(machines, self.graph, changes, self.comfyui, bool(self.gpus))
        self.say(report(machines.values()), flush=True)
        return all(machine.can_run() for machine in machines.values())

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

        where = {"num_cpus": 0, "scheduling_strategy": "SPREAD"} if self.store.files else on_node(self.home)
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

    def free(self) -> dict[str, int]:
        """`capacity` without what is in use now."""
        from ray._private.state import available_resources_per_node

        return {node: room(resources, self.gpus, self.cpus) for node, resources in available_resources_per_node().items()}

    def no_capacity(self) -> str:
        gpus = f" and {self.gpus:g} GPUs: give --gpus 0 for machines without." if self.gpus else ""
        return f"No machine of the cluster has {self.cpus:g} free CPUs{gpus}"

    def compare_machines(self) -> tuple[dict[str, Machine], dict[str, str]]:
        """Asks the machines for their versions. Starts no ComfyUI.

        Returns:
            (Ray's id -> machine, excluded where its versions are not those of most; the `versions` of most).

        Raises:
            BatchError: no machine can take part.
        """
        import ray

        task = ray.remote(versions_here)
        nodes = {task.options(**on_node(node)).remote(self.comfyui): node for node in self.capacity()}
        ready, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=VERSION_SECONDS) if nodes else ([], [])
        machines = {}
        for ref in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                machines[nodes[ref]] = Machine(*ray.get(ref))
        expected = majority((machine.versions for machine in machines.values() if not machine.excluded),
                            versions(self.comfyui) if self.comfyui else None)
        if not expected:
            raise BatchError("; ".join(f"{machine.name} {machine.excluded}" for machine in machines.values())
                             or self.no_capacity())
        for machine in machines.values():
            machine.excluded = machine.excluded or difference(machine.versions, expected)
        return machines, expected

    # --- drawing ---

    def render(self, rows: list[dict]) -> collections.Counter:
        """Draws rows, {"id", "changes", "stamp"}, and counts them by their end."""
        self.connect()
        import ray

        machines, expected = self.compare_machines()
        excluded = {node for node, machine in machines.items() if machine.excluded}
        for text in itertools.chain.from_iterable(machines[node].sentences() for node in excluded):
            self.say(text, flush=True)
        writer = None
        if not self.store.files and not self.out.startswith("file://"):
            writer = ray.remote(StoreActor).options(max_restarts=-1, max_task_retries=-1, max_concurrency=16,
                                                    **on_node(self.home)).remote(self.out)
        actor = ray.remote(self.worker)
        given = (self.graph, self.out, self.home if writer else "", writer, self.comfyui, expected)

        def start(node: str):
            return actor.options(**{**on_node(node), "num_cpus": self.cpus, "num_gpus": self.gpus}).remote(*given)

        progress = Progress(len(rows), self.say)
        RowPool(start, self.capacity, self.free, excluded, self.workers, progress).render(rows)
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
