"""Renders a batch on Ray: each row of changes to one workflow becomes pictures in a store."""
import collections
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from . import by_value
from .actor_pool import ActorPool, machine_resources, share_out
from .batch_progress import BatchProgress
from .batch_row_rendering import RowRun
from .batch_rows import RowIndex, chunks, read_changes, read_lines, scan_rows
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
from .ray_connection import (
    AUTO_CONNECT_ENV,
    connect,
    is_joined,
    local_environment,
    on_node,
    resolve_address,
)
from .worker import RowRenderer, node_info

CHUNK = 20_000  # rows that are scanned at a time
VERSION_SECONDS = 60  # for a machine to report its versions


@dataclass
class Batch:
    """A batch and where it runs.

    Args:
        graph: the workflow.
        rows: path of the file of rows.
        out: see `Store`.
        workers: (minimum, maximum); maximum 0: as many as fit.
        gpus, cpus: of each worker; None: see `share_out`.
        address: of the cluster, see `resolve_address`.
        shard: (i, n): the i-th of n parts of the rows.
        comfyui: this command's own ComfyUI, or "".
        say: prints a text, with the arguments of `print`.
        worker: the actor that renders a row.
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
    say: Callable[..., None] = print
    worker: type = RowRenderer

    def run(self) -> collections.Counter:
        """Renders the rows that are not done yet.

        Returns:
            How many rows were "done" before, "drawn", and "failed", invalid lines included.

        Raises:
            MachineError, OSError, ValueError
        """
        self.store = Store(self.out)
        index = self.scan()
        for number, reason in index.invalid:
            self.say(f"Line {number} {reason.rstrip('.')}.", flush=True)
        counts = collections.Counter({"done": index.done, "failed": len(index.invalid)})
        if index.pending:
            try:
                counts += self.render([{"id": name, "changes": text, "stamp": stamp}
                                       for name, text, stamp, _ in index.pending])
            except KeyboardInterrupt:
                if is_joined():
                    sys.modules["ray"].shutdown()  # ends the workers, which may be writing
                raise
            finally:
                self.store.remove_parts(index.names)
        return +counts

    def check(self) -> bool:
        """Prints what each machine is and lacks.

        Returns:
            Whether all machines can run the workflow.

        Raises:
            MachineError, OSError
        """
        self.connect()
        machines, _ = self.compare_machines()
        for node in self.share.capacity().keys() - machines.keys():
            machines[node] = MachineReport(f"Ray's node {node[:8]}", {},
                                           f"did not answer within {VERSION_SECONDS} s")
        changes = file_changes(self.graph, read_changes(self.rows))
        check_machines(machines, self.graph, changes, self.comfyui, bool(self.share.gpus))
        self.say(report(machines.values()), flush=True)
        return all(machine.can_run() for machine in machines.values())

    # --- the rows ---

    def scan(self) -> RowIndex:
        """Finds the rows that are to be rendered, and removes half-written files of theirs."""
        index = RowIndex(self.shard)
        for part in chunks(read_lines(self.rows), CHUNK):
            index.add(scan_rows(self.out, self.graph, part))
        self.store.remove_parts(index.names)
        return index

    # --- the cluster ---

    def connect(self):
        """Connects to the cluster, or starts Ray on this machine. Raises MachineError."""
        if not is_joined():
            join(resolve_address(self.address))
        import ray
        from ray import cloudpickle

        by_value(cloudpickle)
        self.home = ray.get_runtime_context().get_node_id()
        self.share = share_out(machine_resources().values(), self.gpus, self.cpus)

    def no_capacity_message(self) -> str:
        gpus = ""
        if self.share.gpus:
            gpus = f" and {self.share.gpus:g} GPUs: give --gpus 0 for machines without"
        return f"No machine of the cluster has {self.share.cpus:g} free CPUs{gpus}."

    def compare_machines(self) -> tuple[dict[str, MachineReport], dict[str, str]]:
        """Compares the versions of the machines. Starts no ComfyUI.

        Returns:
            (Ray's node id -> machine, which is excluded unless it has the versions of the majority;
            `installed_versions` of the majority).

        Raises:
            MachineError: no machine can take part.
        """
        import ray.exceptions

        task = ray.remote(local_versions)
        nodes = {
            task.options(**on_node(node)).remote(self.comfyui): node
            for node in self.share.capacity()
        }
        ready = []
        if nodes:
            ready, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=VERSION_SECONDS)
        machines = {}
        for ref in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                machines[nodes[ref]] = MachineReport(*ray.get(ref))
        expected = majority_versions(
            (machine.versions for machine in machines.values() if not machine.excluded),
            installed_versions(self.comfyui) if self.comfyui else None)
        if not expected:
            reasons = [f"{machine.name} {machine.excluded}" for machine in machines.values()]
            raise MachineError("; ".join(reasons) or self.no_capacity_message())
        for machine in machines.values():
            machine.excluded = machine.excluded or version_difference(machine.versions, expected)
        return machines, expected

    # --- rendering ---

    def render(self, rows: list[dict]) -> collections.Counter:
        """Renders rows, {"id", "changes", "stamp"} each.

        Returns:
            How many rows ended with each status.
        """
        self.connect()
        import ray

        pool = self.make_pool()
        progress = BatchProgress(len(rows), self.say)
        try:
            RowRun(pool, ray.put(self.graph), rows, self.workers, progress).render()
        finally:
            pool.end_all()
        return progress.counts

    def make_pool(self) -> ActorPool:
        """Returns a pool, still without workers, that renders any workflow into the store.

        Raises:
            MachineError: no machine can take part.
        """
        import ray

        _, expected = self.compare_machines()
        writer = None
        if "://" not in self.out:
            writer = ray.remote(Store).options(
                max_restarts=-1, max_task_retries=-1, max_concurrency=16, **on_node(self.home)
            ).remote(self.out)
        home = self.home if writer else ""
        return ActorPool(self.worker, (self.out, home, writer, self.comfyui, expected), self.share)


def join(address: str):
    """Makes this process a driver, see `ray_connection.connect`. Raises MachineError."""
    os.environ.setdefault(AUTO_CONNECT_ENV, "0")
    if address == "local":
        os.environ.update(local_environment(os.environ))
    connect(address)


def local_versions(comfyui: str) -> tuple[str, dict[str, str], str]:
    """Returns (this machine's name, `installed_versions`, why it cannot take part or "")."""
    name = node_info()["name"]
    try:
        return name, installed_versions(find_comfyui(comfyui), launch_arguments(True)), ""
    except MachineError as error:
        return name, {}, str(error)
