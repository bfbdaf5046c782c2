"""python -m devtools.measure.cluster_bench [memory] [speed] [scale] [resume]: what a batch on Ray
takes, on clusters here.

Leaves machines.json and machines.md. Linux only. Speed wants two cores that have nothing else to
do, scale 12 GB of memory (fewer with --actors), resume a million small files of disk.
"""
import argparse
import contextlib
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

# before ray: it reads the environment
from devtools.cluster import QUIET, changes, make_base, model_paths, running, workflow
from devtools.measure.figures import Report
from devtools.measure.timing import machine

import psutil
import ray

from devtools import ROOT
from devtools.host.server import Server
from featherweight.cluster import batch_run, worker, workflow_graph
from featherweight.cluster.batch_progress import BatchProgress
from featherweight.cluster.batch_rows import read_lines, scan_rows
from featherweight.cluster.embedded_comfyui import PromptResult
from featherweight.cluster.worker import RowRenderer

STEPS = 12  # of a picture, which the figures are of
PNG = 1_500_000  # bytes of a picture of 1024 x 1024
ENDS = ("execution_success", "execution_error", "execution_interrupted")


@contextlib.contextmanager
def machines(count: int, folder: Path):
    """A cluster of nodes with a CPU each and the demo's model, of which all have the same files."""
    names = [f"node{index}" for index in range(count)]
    first = make_base(folder / names[0])
    bases = {
        name: first if name == names[0] else make_base(folder / name, first / "models")
        for name in names
    }
    with running(bases, folder / "ray") as found:
        yield found


def write_rows(folder: Path, rows: list[dict]) -> Path:
    """Writes the table of a batch; returns its path."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- memory ---

def mappings(pid: int, below: str) -> dict[str, int]:
    """Bytes of a process's resident pages.

    Returns:
        "files": of models' files below a folder; "files_private": of these, what no other process
        has; "private": of everything.
    """
    maps = psutil.Process(pid).memory_maps()
    files = [entry for entry in maps if below in entry.path and "/models/" in entry.path]
    return {"files": sum(entry.rss for entry in files), "files_private": sum(map(_private, files)),
            "private": sum(map(_private, maps))}


def _private(entry) -> int:
    return entry.private_clean + entry.private_dirty


def measure_memory(options) -> Iterator[tuple[str, dict]]:
    """Two workers, each on a node of its own with the same model files, resident; private: in no
    other process. Then what more prompts take."""
    with tempfile.TemporaryDirectory(prefix="fwm") as folder, machines(2, Path(folder)) as cluster:
        actor = ray.remote(worker.PromptWorker)
        workers = [
            actor.options(num_cpus=1, max_concurrency=4,
                          label_selector={"ray.io/node-id": node.node_id}).remote()
            for node in cluster.nodes.values()
        ]
        pids = [info["pid"] for info, _ in ray.get([each.ready.remote() for each in workers])]

        def drawn(some, numbers):
            for number in numbers:
                asked = workflow_graph.with_result(
                    workflow(changes(number)["4.text"], number, steps=2), ["8", 0])
                streams = [
                    each.render.options(num_returns="streaming").remote(asked, {}, f"{number}")
                    for each in some
                ]
                ray.get([stream.completed() for stream in streams])

        drawn(workers, range(20))
        for name, pid in zip(("first worker", "second worker"), pids):
            yield name, mappings(pid, folder)
        before = mappings(pids[0], folder)["private"]
        drawn(workers[:1], range(20, 20 + options.prompts))
        after = mappings(pids[0], folder)["private"]
        yield f"{options.prompts} prompts", {
            "private_before": before, "private_after": after, "growth": after - before
        }


# --- speed ---

def plain_times(folder: Path, base: Path, count: int, servers: int) -> list[list[float]]:
    """When each picture of plain ComfyUIs was ready. They draw at the same time, each on a thread;
    no queue is ever empty."""
    with contextlib.ExitStack() as stack:
        each_server = [
            stack.enter_context(
                Server(folder / f"plain{servers}_{index}", env={**QUIET, "OMP_NUM_THREADS": "1"},
                       arguments=["--extra-model-paths-config",
                                  str(model_paths(base))])) for index in range(servers)
        ]
        asked = [
            workflow_graph.apply_changes(workflow(steps=STEPS), changes(index))
            for index in range(count)
        ]
        names = [[
            json.loads(server.post("/prompt", {"prompt": each}))["prompt_id"] for each in asked
        ] for server in each_server]
        while any(len(server.get_json("/history")) < count for server in each_server):
            time.sleep(0.5)
        told = [server.get_json("/history") for server in each_server]
    return [[
        data["timestamp"] / 1000 for name in each
        for event, data in history[name]["status"]["messages"] if event in ENDS
    ] for each, history in zip(names, told)]


def intervals(ended: list[list[float]]) -> float:
    """Median seconds between the pictures of a worker; its first, for which it loads the model, are
    not counted."""
    return statistics.median(later - before for times in ended
                             for before, later in itertools.pairwise(times))


def batch_seconds(folder: Path, nodes: int, count: int, asked: dict,
                  worker: type) -> tuple[float, float]:
    """(seconds from picture to picture of a worker, pictures a second of all workers) of a
    batch."""
    folder.mkdir()
    out = folder / "out"
    rows = write_rows(folder, [{"id": f"{index:04}", **changes(index)} for index in range(count)])
    with machines(nodes, folder / "cluster") as cluster:
        done = batch_run.Batch(asked, str(rows), str(out), address=cluster.address, cpus=1, gpus=0,
                           worker=worker).run()
        assert done["drawn"] == count, done
    ended: dict[str, list[float]] = {}
    for path in sorted(out.glob("*.json"), key=lambda path: path.stat().st_mtime):
        ended.setdefault(json.loads(path.read_text())["worker"], []).append(path.stat().st_mtime)
    own = intervals(list(ended.values()))
    return own, sum(1 / intervals([times]) for times in ended.values())


def measure_speed(options) -> Iterator[tuple[str, dict]]:
    """Pictures of the demo in 12 steps by a plain ComfyUI and by two at once, by one worker and by
    two, each on one thread. Then with a sleep in the picture's place, as where a GPU draws and the
    processor's cores are free."""
    with tempfile.TemporaryDirectory(prefix="fwm") as name:
        folder = Path(name)
        base = make_base(folder / "base")
        plain = intervals(plain_times(folder, base, options.pictures, 1))
        yield "plain", {"picture (ms)": 1000 * plain, "pictures a second": 1 / plain}
        both = sum(1 / intervals([times])
                   for times in plain_times(folder, base, options.pictures, 2))
        yield "two plain", {"pictures a second": both, "times one": both * plain}
        asked = workflow(steps=STEPS)
        sleeping = {
            **asked, "1": {"class_type": "Sleep", "inputs": {"seconds": plain, "bytes": PNG}}
        }
        numbers = itertools.count(1)
        for kind, what, worker in (("", asked, RowRenderer), (", asleep", sleeping, Sleeper)):
            rates = []
            for nodes, which in enumerate(("one worker", "two workers"), start=1):
                where = folder / str(next(numbers))  # short: Ray's sockets lie below it
                own, rate = batch_seconds(where, nodes, nodes * options.pictures, what, worker)
                rates.append(rate)
                yield which + kind, {
                    "picture (ms)": 1000 * own, "pictures a second": rate,
                    "overhead (ms)": 1000 * (own - plain), "times one": rate / rates[0]
                }


# --- scale ---

class Sleeping:
    """In the place of a ComfyUI, as `Worker.boot`: a graph's node "1" says how many seconds it
    sleeps, and its file's size."""

    def __init__(self, comfyui: str):
        self.comfyui = comfyui

    def runs_prompts(self) -> bool:
        return True

    def run(self, asked: dict) -> PromptResult:
        inputs = asked["1"]["inputs"]
        time.sleep(inputs["seconds"])
        return PromptResult({"9_0.png": bytes(inputs.get("bytes", 9))})


class Sleeper(RowRenderer):
    boot = Sleeping  # pyright: ignore[reportAssignmentType]


class NotingProgress(BatchProgress):
    """Notes each answer: (monotonic time, CPU seconds of this process, worker)."""
    notes: ClassVar[list[tuple[float, float, str]]] = []

    def add(self, answer: dict):
        self.notes.append((time.monotonic(), cpu_seconds(), answer["worker"]))
        super().add(answer)


def cpu_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def sleeping_rows(options) -> tuple[dict, list[dict]]:
    asked = {
        "1": {"class_type": "Sleep", "inputs": {"seconds": options.sleep, "text": "", "seed": 0}}
    }
    return asked, [
        {"id": f"{index:07}", "1.seed": index, "1.text": changes(index)["4.text"]}
        for index in range(options.tasks)
    ]


def many(options, folder: Path):
    """A cluster of one node with a CPU for each actor."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    return running({"many": base}, folder / "ray", cpus=options.actors)


def figures_of(seen: list[tuple[float, float, str]], options) -> dict:
    """Of the time in which all actors are there: from when the last of them has answered."""
    first = {}
    for index, (_, _, name) in enumerate(seen):
        first.setdefault(name, index)
    start, end = max(first.values()), len(seen) - 1
    seconds, tasks = seen[end][0] - seen[start][0], end - start
    return {"actors": str(len(first)), "tasks": str(tasks), "all_seconds": seconds,
            "of the ideal": tasks / seconds * options.sleep / len(first),
            "driver's CPU (ms a task)": 1000 * (seen[end][1] - seen[start][1]) / tasks,
            "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_scale(options) -> Iterator[tuple[str, dict]]:
    """Rows with a sleep in the sampler's place; a worker of a batch saves a file and a record of
    each, on a RAM disk."""
    asked, rows = sleeping_rows(options)
    with tempfile.TemporaryDirectory(prefix="fwm", dir="/dev/shm") as name:
        folder = Path(name)
        with many(options, folder):
            table = write_rows(folder, rows)
            with mock.patch.object(batch_run, "BatchProgress", NotingProgress):
                done = batch_run.Batch(asked, str(table), str(folder / "out"), cpus=1, gpus=0,
                                   worker=Sleeper).run()
            assert done == {"drawn": len(rows)}, done
            yield "batch.py", figures_of(NotingProgress.notes, options)


# --- resume ---

def measure_resume(options) -> Iterator[tuple[str, dict]]:
    """A batch of which every row is done, with a picture and a record of each in one folder of this
    disk."""
    options.sleep, options.tasks = 0, options.rows
    asked, rows = sleeping_rows(options)
    # whose removal takes its time too
    with tempfile.TemporaryDirectory(prefix="fwm", dir=options.disk) as name:
        folder = Path(name)
        table, out = write_rows(folder, rows), folder / "out"
        for row, text, stamp, _ in scan_rows(str(out), asked, list(read_lines(str(table)))).pending:
            (out / f"{row}_9_0.png").touch()
            (out / f"{row}.json").write_text(
                json.dumps({
                    "stamp": stamp, "changes": json.loads(text), "worker": "node0:12345",
                    "seconds": 1.234, "files": [f"{row}_9_0.png"]
                }))
        with many(options, folder):
            started, own = time.monotonic(), cpu_seconds()
            done = batch_run.Batch(asked, str(table), str(out), cpus=1, gpus=0).run()
            assert done == {"done": len(rows)}, done
            yield f"{len(rows)} rows", {
                "seconds": time.monotonic() - started, "driver's CPU seconds": cpu_seconds() - own
            }


MEASURES = {
    "memory": measure_memory, "speed": measure_speed, "scale": measure_scale,
    "resume": measure_resume
}


def main():
    parser = argparse.ArgumentParser(prog="python -m devtools.measure.cluster_bench",
                                     description=__doc__)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", default=list(MEASURES))
    parser.add_argument("--prompts", type=int, default=400, help="of memory")
    parser.add_argument("--pictures", type=int, default=30, help="of speed, for each worker")
    parser.add_argument("--actors", type=int, default=100, help="of scale")
    parser.add_argument("--tasks", type=int, default=100_000, help="of scale")
    parser.add_argument("--sleep", type=float, default=0.2,
                        help="of scale: seconds in the sampler's place")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of resume")
    parser.add_argument("--disk", help="of resume: a folder of the disk to use")
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "bench",
                        help="folder for the results")
    options = parser.parse_args()
    Report(options.out, "machines", machine()).run(MEASURES, options.measures, options)


if __name__ == "__main__":
    main()
