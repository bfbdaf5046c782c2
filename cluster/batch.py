"""A batch: rows of changes to one workflow -> pictures in a folder or bucket, drawn by actors of
Ray."""
import collections
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import by_value
from .actor_pool import ActorPool, machine_resources, share_out
from .batch_progress import Progress
from .batch_rows import RowIndex, changes_of, chunks, lines, scan_rows
from .comfyui_install import (
    MachineError,
    find_comfyui,
    installed_versions,
    launch_arguments,
    majority_versions,
    version_difference,
)
from .picture_store import Store
from .preflight import MachineReport, check_machines, file_changes, report
from .ray_connection import ALONE, connect, is_joined, local_environment, on_node, resolve_address
from .row_run import RowRun
from .worker import RowRenderer, node_info

LOCAL_SCAN_ROWS = 20_000  # up to which the scan is quicker in this process than in tasks
CHUNK = 5_000  # rows in one task of the scan
VERSION_SECONDS = 60  # that a machine has to say its versions


@dataclass
class Batch:
    """What is to be drawn, and on what.

    Args:
        graph: the workflow.
        rows: path of the lines.
        out: see `Store`.
        workers: (fewest, most), 0: as many as fit.
        gpus, cpus: of each worker, None: by what the machines have, see `share_out`.
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
            MachineError, OSError, ValueError
        """
        self.store = Store(self.out)
        table = self.scan()
        for number, reason in table.bad:
            self.say(f"Line {number} {reason.rstrip('.')}.", flush=True)
        counts = collections.Counter({"there": table.there, "failed": len(table.bad)})
        if table.left:
            try:
                counts += self.render([{"id": name, "changes": text, "stamp": stamp}
                                       for name, text, stamp, _ in table.left])
            except KeyboardInterrupt:
                if is_joined():
                    sys.modules["ray"].shutdown()  # ends the workers, which may be writing
                raise
            finally:
                self.store.tidy(table.names)
        return +counts

    def check(self) -> bool:
        """Says of each machine what it is and lacks. Returns whether all can run it. Raises
        MachineError, OSError."""
        self.connect()
        machines, _ = self.compare_machines()
        for node in self.share.capacity().keys() - machines.keys():
            machines[node] = MachineReport(f"Ray's node {node[:8]}", {},
                                           f"did not answer within {VERSION_SECONDS} s")
        changes = file_changes(self.graph, changes_of(self.rows))
        check_machines(machines, self.graph, changes, self.comfyui, bool(self.share.gpus))
        self.say(report(machines.values()), flush=True)
        return all(machine.can_run() for machine in machines.values())

    # --- what is there ---

    def scan(self) -> RowIndex:
        table, rows = RowIndex(self.shard), lines(self.rows)
        scans = [scan_rows(self.out, self.graph, next(chunks(rows, LOCAL_SCAN_ROWS), []))]
        rest = chunks(rows, CHUNK)
        if first := next(rest, None):
            self.connect()
            scans += self.scan_on_ray(itertools.chain([first], rest))
        for each in scans:
            table.add(each)
        self.store.tidy(table.names)
        return table

    def scan_on_ray(self, parts: Iterator[list]) -> list:
        """Scans lines, as many parts at once as there are processors where the store is, in their
        order."""
        import ray

        where = (
            {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
            if self.store.files
            else on_node(self.home)
        )
        at_once = int(ray.cluster_resources().get("CPU", 1)) if self.store.files else os.cpu_count()
        task, graph = ray.remote(scan_rows).options(**where), ray.put(self.graph)
        scans, running = [], collections.deque()
        for part in parts:
            if len(running) > at_once:
                scans.append(ray.get(running.popleft()))
            running.append(task.remote(self.out, graph, part))
        return scans + ray.get(list(running))

    # --- the cluster ---

    def connect(self):
        """Joins the cluster, or starts one of this machine. Raises MachineError."""
        if not is_joined():
            address = resolve_address(self.address)
            os.environ.setdefault(ALONE, "0")
            if address == "local":
                os.environ.update(local_environment(os.environ))
            connect(address)
        import ray

        by_value(ray.cloudpickle)
        self.home = ray.get_runtime_context().get_node_id()
        self.share = share_out(machine_resources().values(), self.gpus, self.cpus)

    def no_capacity(self) -> str:
        gpus = (
            f" and {self.share.gpus:g} GPUs: give --gpus 0 for machines without."
            if self.share.gpus
            else ""
        )
        return f"No machine of the cluster has {self.share.cpus:g} free CPUs{gpus}"

    def compare_machines(self) -> tuple[dict[str, MachineReport], dict[str, str]]:
        """Asks the machines for their versions. Starts no ComfyUI.

        Returns:
            (Ray's id -> machine, excluded where its versions are not those of most; the
            `installed_versions` of most).

        Raises:
            MachineError: no machine can take part.
        """
        import ray

        task = ray.remote(local_versions)
        nodes = {
            task.options(**on_node(node)).remote(self.comfyui): node
            for node in self.share.capacity()
        }
        ready, _ = (
            ray.wait(list(nodes), num_returns=len(nodes), timeout=VERSION_SECONDS)
            if nodes
            else ([], [])
        )
        machines = {}
        for ref in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                machines[nodes[ref]] = MachineReport(*ray.get(ref))
        expected = majority_versions(
            (machine.versions for machine in machines.values() if not machine.excluded),
            installed_versions(self.comfyui) if self.comfyui else None)
        if not expected:
            raise MachineError("; ".join(f"{machine.name} {machine.excluded}"
                                         for machine in machines.values()) or self.no_capacity())
        for machine in machines.values():
            machine.excluded = machine.excluded or version_difference(machine.versions, expected)
        return machines, expected

    # --- drawing ---

    def render(self, rows: list[dict]) -> collections.Counter:
        """Draws rows, {"id", "changes", "stamp"}, and counts them by their end."""
        self.connect()
        import ray

        _, expected = self.compare_machines()
        writer = None
        if not self.store.files and not self.out.startswith("file://"):
            writer = ray.remote(Store).options(
                max_restarts=-1, max_task_retries=-1, max_concurrency=16, **on_node(self.home)
            ).remote(self.out)
        home = self.home if writer else ""
        given = (self.graph, self.out, home, writer, self.comfyui, expected)
        pool = ActorPool(self.worker, given, self.share)
        progress = Progress(len(rows), self.say)
        try:
            RowRun(pool, rows, self.workers, progress).draw()
        finally:
            pool.end_all()
        return progress.counts


def local_versions(comfyui: str) -> tuple[str, dict[str, str], str]:
    """(this machine's name, `installed_versions`, what keeps it from taking part)."""
    name = node_info()["name"]
    try:
        return name, installed_versions(find_comfyui(comfyui), launch_arguments(True)), ""
    except MachineError as error:
        return name, {}, str(error)
