"""A batch: rows of changes to one workflow -> pictures in a folder or bucket, by Ray Data's pool of actors.

What is done is looked up first, and nothing is started for it. Then passes draw: a row that a machine cannot do goes to the
others in the next pass, a row whose own fault it is fails alone.
"""
import collections
import contextlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from . import by_value
from .check import checked, most
from .draw import Draw
from .fetch import pinned
from .following import end_passes, followed
from .joining import ALONE, is_joined, join, local_environment, nearest
from .machine import difference
from .place import MachineError, arguments, find, versions
from .progress import Progress
from .rows import Table, changes_of, chunks, lines, look
from .store import Store, Writer
from .worker import machine

HERE = 20_000  # rows up to which the look is quicker in this process than in tasks
CHUNK = 5_000  # rows in one task of the look
ATTEMPTS = 2  # passes in which a row's worker may end while it draws it, each with RETRIES
RETRIES = 2


class BatchError(Exception):
    """Why nothing can be drawn, and what to do, in one sentence."""


@dataclass
class Batch:
    """What is to be drawn, and on what.

    graph: the workflow; rows: path of the lines; out: see `machines/store.py`; workers: (fewest, most), 0: as many as fit;
    gpus, cpus: of each worker, None: what the machines have; address: of the cluster; shard: (i, n); elsewhere: the driver's
    own ComfyUI, or ""; say: as print; worker: what draws a row.
    """
    graph: dict
    rows: str
    out: str
    workers: tuple[int, int] = (1, 0)
    gpus: float | None = None
    cpus: float | None = None
    address: str = "auto"
    shard: tuple[int, int] = (1, 1)
    elsewhere: str = ""
    say: object = print
    worker: type = Draw

    def run(self) -> collections.Counter:
        """How many rows were there, drawn, and failed (of the lines that are no rows too). Raises BatchError."""
        self.store = Store(self.out)
        table = self.looked()
        for number, said in table.bad:
            self.say(f"Line {number} {said.rstrip('.')}.", flush=True)
        counts = collections.Counter({"there": table.there, "failed": len(table.bad)})
        if table.left:
            try:
                counts += self.drawn([{"id": name, "changes": text, "stamp": stamp} for name, text, stamp, _ in table.left])
            except KeyboardInterrupt:
                if is_joined():
                    end_passes()
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
        nodes = {node: bool(self.gpus) for node in self.machines()}
        if not nodes:
            raise BatchError(self.nobody())
        return checked(nodes, self.elsewhere, self.graph, changes_of(self.rows), send, lambda text: self.say(text, flush=True))

    # --- what is there ---

    def looked(self) -> Table:
        table, found = Table(self.shard), lines(self.rows)
        first = next(chunks(found, HERE), [])
        looks = [look(self.out, self.graph, first)]
        rest = chunks(found, CHUNK)
        for more in rest:
            self.connect()
            looks += self.looks_on_ray(more, rest)
        for each in looks:
            table.add(each)
        self.store.tidy(table.names)
        return table

    def looks_on_ray(self, first: list, rest: Iterator) -> list:
        """Looks at chunks of lines, as many at once as there are processors where the store is, in their order."""
        import ray

        where = {"num_cpus": 0, "scheduling_strategy": "SPREAD"} if self.store.files else pinned(self.home)
        at_once = int(ray.cluster_resources().get("CPU", 1)) if self.store.files else os.cpu_count()
        task, graph = ray.remote(look).options(**where), ray.put(self.graph)
        found, running = [], collections.deque()
        for chunk in itertools.chain([first], rest):
            if len(running) > at_once:
                found.append(ray.get(running.popleft()))
            running.append(task.remote(self.out, graph, chunk))
        return found + ray.get(list(running))

    # --- the cluster ---

    def connect(self):
        """Join the cluster, or start one of this machine. Raises BatchError."""
        try:
            if not is_joined():
                address = nearest(self.address)
                os.environ.setdefault(ALONE, "0")
                if address == "local":
                    os.environ.update(local_environment(os.environ))
                join(address)
            import ray
            import ray.data
        except ImportError as error:
            raise BatchError(f"Ray is missing ({error}). Install it for this Python: {sys.executable} -m pip install"
                             ' "ray[data]"') from error
        except MachineError as error:
            raise BatchError(str(error)) from error
        by_value(ray.cloudpickle)
        self.home = ray.get_runtime_context().get_node_id()

    def machines(self) -> dict[str, dict[str, float]]:
        """Ray's node -> what it has, of those that are alive and have what a worker needs."""
        import ray

        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if self.gpus is None:
            self.gpus = 1.0 if any(found.get("GPU") for found in alive.values()) else 0.0
        if self.cpus is None:
            kind = "GPU" if self.gpus else "CPU"  # all processors of the smallest machine, shared out among its GPUs
            shares = [found.get("CPU", 0) // max(found["GPU"] // self.gpus if self.gpus else 1, 1)
                      for found in alive.values() if found.get(kind)]
            self.cpus = max(min(shares, default=1.0), 1.0)
        return {node: found for node, found in alive.items()
                if found.get("CPU", 0) >= self.cpus and found.get("GPU", 0) >= self.gpus}

    def room(self, without: Collection[str]) -> int:
        """How many workers the machines have room for, apart from these nodes."""
        return sum(int(min(resources.get("CPU", 0) // (self.cpus or 1),
                           resources.get("GPU", 0) // self.gpus if self.gpus else 10_000))
                   for node, resources in self.machines().items() if node not in without)

    def nobody(self) -> str:
        return (f"No machine of the cluster has {self.cpus:g} free CPUs"
                + f" and {self.gpus:g} GPUs: give --gpus 0 for machines without." * bool(self.gpus))

    def agreed(self) -> tuple[dict[str, str], set[str]]:
        """(`versions` that most machines have, the nodes that have others), said. Starts no ComfyUI."""
        import ray

        task = ray.remote(version_here)
        asked = {task.options(**pinned(node)).remote(self.elsewhere, bool(self.gpus)): node
                 for node in self.machines()}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=60) if asked else ([], [])
        found = {}
        for ref in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                found[asked[ref]] = ray.get(ref)
        expected = most((here for _, here, problem in found.values() if not problem),
                        versions(self.elsewhere) if self.elsewhere else None)
        if not expected:
            raise BatchError("; ".join(f"{name} {problem}" for name, _, problem in found.values()) or self.nobody())
        out = set()
        for node, (name, here, problem) in found.items():
            if said := problem or difference(here, expected):
                out.add(node)
                self.say(f"{name} {said.rstrip('.')}: it takes no part.", flush=True)
        return expected, out

    # --- drawing ---

    def drawn(self, rows: list[dict]) -> collections.Counter:
        self.connect()
        import ray

        expected, unfit = self.agreed()
        writer = None
        if not self.store.files and not self.out.startswith("file://"):
            writer = ray.remote(Writer).options(max_restarts=-1, max_task_retries=-1, max_concurrency=16,
                                                **pinned(self.home)).remote(self.out)
        arguments = (self.graph, self.out, self.home if writer else "", writer, expected, self.elsewhere)
        progress = Progress(len(rows), self.say)
        self.passes(rows, unfit, arguments, progress)
        return progress.counts

    def passes(self, rows: list[dict], unfit: set[str], arguments: tuple, progress: Progress):
        """Draw all rows. unfit: nodes that take no part from the start. arguments: of `Draw`."""
        attempts, named = collections.Counter(), set()
        tried = {row["id"]: set(unfit) for row in rows}  # the nodes that cannot draw it
        words, waiting = {}, rows  # words: of the last of them
        while True:
            there = self.machines().keys()
            for row in [row for row in waiting if not there - tried[row["id"]]]:
                progress.add({"id": row["id"], "status": "failed", "worker": "",
                              "said": words.get(row["id"], "no machine is left that could draw it")})
            waiting = [row for row in waiting if there - tried[row["id"]]]
            if not waiting:
                return
            sound = [row for row in waiting if not attempts[row["id"]]] or waiting  # first those that end no worker
            without = unfit | named  # one pass for all, where any machine is left
            if not there - without:
                without = tried[sound[0]["id"]]
                sound = [row for row in sound if tried[row["id"]] == without]
            missing, next_ones = {row["id"]: row for row in sound}, []
            for answer in self.answers(sound, frozenset(without), attempts[sound[0]["id"]], arguments):
                row = missing.pop(answer["id"], None)
                if row is None:  # what went with a machine and was made again
                    continue
                if answer["status"] != "left":
                    progress.add(answer)
                    continue
                tried[row["id"]].add(answer["node"])
                words[row["id"]] = answer["said"]
                if not self.machines().keys() - tried[row["id"]]:
                    progress.add({**answer, "status": "failed"})
                    continue
                if answer["node"] not in named:
                    named.add(answer["node"])
                    progress.tell(f"{row['id']} goes to another machine: {answer['said']}")
                next_ones.append(row)
            is_own_fault = bool(self.machines().keys() - without)  # and not that all who could draw it went away
            for name, row in missing.items():
                attempts[name] += is_own_fault
                if attempts[name] < ATTEMPTS:
                    next_ones.append(row)
                else:
                    progress.add({"id": name, "status": "failed", "worker": "",
                                  "said": f"its worker ended {ATTEMPTS * (RETRIES + 1)} times while it was drawn"})
            drawn = {row["id"] for row in sound}
            waiting = [row for row in waiting if row["id"] not in drawn] + next_ones

    def answers(self, rows: list[dict], without: frozenset, ended: int, arguments: tuple) -> Iterator[dict]:
        """One pass: answers of `Draw` as they come; none for a row whose worker ended each time."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.execution_options.preserve_order = False
        context.max_errored_blocks = -1
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        fewest, most = self.workers
        most = max(most or 10_000, fewest)
        room = self.room(without)
        first = min(max(fewest, room), most, max(len(rows), fewest))
        in_block = 1 if ended else max(1, min(10, len(rows) // (50 * first)))  # few, so that nobody waits long for the last
        elsewhere = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(without))})"}} if without else {}
        pool = ray.data.ActorPoolStrategy(min_size=fewest, max_size=most, initial_size=first,
                                          max_tasks_in_flight_per_actor=1 if ended else 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the retries, which have no other name yet
            data = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // in_block)).map(
                self.worker, fn_constructor_args=arguments, num_cpus=self.cpus, num_gpus=self.gpus, compute=pool,
                max_task_retries=RETRIES, **elsewhere)
        yield from followed(data.iter_rows(), lambda: bool(self.machines().keys() - without), self.say)


def version_here(elsewhere: str, has_gpu: bool) -> tuple[str, dict[str, str], str]:
    """(this machine's name, `versions`, what keeps it from taking part)."""
    name = machine()["name"]
    try:
        return name, versions(find(elsewhere), arguments(has_gpu)), ""
    except MachineError as error:
        return name, {}, str(error)
