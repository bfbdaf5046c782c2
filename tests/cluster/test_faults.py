"""A batch whose workers, machines or driver are killed loses time and nothing else.

The quick tests have a painter in place of ComfyUI; the heavy ones also run ComfyUI itself, with
twenty faults at random moments.
"""
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from devtools.cluster import QUIET, changes, running, workflow

import psutil
import pytest
from process_tree import wait_until

from devtools.host import server
from featherweight.cluster.workflow_graph import apply_changes

from .driver import painted

pytest.importorskip("ray")
DRIVER = Path(__file__).with_name("driver.py")
TIMEOUT = 600  # seconds, on a busy machine
PAINT = {"1": {"class_type": "Paint", "inputs": {"text": "", "seed": 0, "seconds": 0.05}}}


def kill(pid: int):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class FaultyBatch:
    """A batch in a process of its own, and the faults that tests cause in it.

    Args:
        cluster: None for a private Ray.
        folder: for all files of the batch.
        rows: of the batch.
        graph: the workflow.
        is_painted: whether workers run a painter in place of ComfyUI.
        draw: returns the expected picture of a row.
    """

    def __init__(self, cluster, folder: Path, rows: list[dict], graph: dict, is_painted: bool,
                 draw: Callable[[dict], bytes]):
        self.cluster = cluster
        self.folder = folder
        self.rows = rows
        self.graph = graph
        self.is_painted = is_painted
        self.draw = draw
        self.out = folder / "out"
        self.log = folder / "log"
        self.lost = 0  # how many rows may have been in flight when something ended
        (folder / "workflow.json").write_text(json.dumps(graph), encoding="utf-8")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                           encoding="utf-8")

    def start(self, **variables: str):
        command = [
            sys.executable,
            str(DRIVER),
            *(str(self.folder / name) for name in ("workflow.json", "rows.jsonl", "out")),
            self.cluster.address if self.cluster else "local",
            str(self.log),
        ]
        if self.is_painted:
            command.append("--painted")
        with open(self.folder / "output", "ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self.folder,
                env={**os.environ, **QUIET, "COMFYUI_PATH": str(server.HOST), **variables})

    def output(self) -> str:
        return (self.folder / "output").read_text(encoding="utf-8")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def done(self) -> int:
        return len(list(self.out.glob("*.json"))) if self.out.exists() else 0

    def wait_for_rows(self, count: int = 1):
        """Waits until `count` more rows are done, or all of them."""
        target = min(self.done() + count, len(self.rows))
        wait_until(lambda: self.done() >= target or self.ended())

    def workers(self) -> list[psutil.Process]:
        workers = []
        for node in self.cluster.nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                workers += [
                    process for process in psutil.Process(raylet(node)).children(recursive=True)
                    if "Renderer" in process.cmdline()[0]
                ]
        return workers

    def kill_worker(self, chance: random.Random):
        if workers := self.workers():
            self.lost += 1
            kill(chance.choice(workers).pid)

    def kill_machine(self, chance: random.Random):
        """Kills the raylet of a machine, not of the one that runs the driver, and restarts it."""
        name = chance.choice(list(self.cluster.nodes)[1:])
        self.lost += 1
        kill(raylet(self.cluster.nodes[name]))
        self.cluster.remove(name)
        self.wait_for_rows(chance.randrange(3))
        self.cluster.add(name)

    def kill_driver(self, chance: random.Random):
        self.lost += len(self.cluster.nodes)
        kill(self.process.pid)
        self.process.wait()
        self.start()

    def restart(self):
        """Runs the batch from its beginning."""
        shutil.rmtree(self.out)
        self.log.unlink()
        self.lost = 0
        self.start()

    def finish(self) -> dict:
        self.process.wait(TIMEOUT)
        assert self.process.returncode == 0, self.output()[-3000:]
        return self.counts()

    def counts(self) -> dict:
        """Returns the counts that the batch printed; Ray may have printed something after them."""
        return json.loads([line for line in self.output().splitlines() if line.startswith("{")][-1])

    def check(self):
        """Asserts that every row has its picture and that only rows in flight were repeated."""
        picture = "_1_0.png" if self.is_painted else "_9_0.png"
        names = {f"{row['id']}{end}" for row in self.rows for end in (".json", picture)}
        assert set(os.listdir(self.out)) == names
        for row in self.rows:
            assert (self.out / f"{row['id']}{picture}").read_bytes() == self.draw(row), row
        counts = collections.Counter(line.split()[0] for line in self.log.read_text().splitlines())
        assert len(self.rows) <= counts["begins"] <= len(self.rows) + self.lost


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def batch_on(cluster, folder: Path, count: int, is_painted: bool, plain=None) -> FaultyBatch:
    graph = PAINT if is_painted else workflow()
    rows = []
    for index in range(count):
        change = changes(index)
        if is_painted:
            change = {"1.text": change["4.text"], "1.seed": index}
        rows.append({"id": f"{index:04}", **change})

    def draw(row):
        change = {path: value for path, value in row.items() if path != "id"}
        changed = apply_changes(graph, change)
        return painted(changed) if is_painted else plain(changed)

    return FaultyBatch(cluster, folder, rows, graph, is_painted, draw)


def test_a_worker_a_machine_and_the_batch_itself_are_killed(cluster, tmp_path):
    batch = batch_on(cluster, tmp_path, 60, is_painted=True)
    chance = random.Random(1)
    batch.start()
    try:
        for fault in (batch.kill_worker, batch.kill_machine, batch.kill_driver):
            batch.wait_for_rows(5)
            fault(chance)
        assert "failed" not in batch.finish()
    finally:
        kill(batch.process.pid)
    batch.check()


@pytest.mark.heavy
def test_a_row_that_ends_its_worker_each_time_fails_alone(cluster, tmp_path):
    batch = batch_on(cluster, tmp_path, 12, is_painted=True)
    rows = [*batch.rows[:5], {"id": "crash", "1.text": "crash"}, *batch.rows[5:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch.start()
    try:
        batch.process.wait(TIMEOUT)
    finally:
        kill(batch.process.pid)
    lines = batch.output().splitlines()
    assert batch.counts() == {"drawn": 12, "failed": 1}, lines
    assert [line for line in lines if line.startswith("crash: its worker ended")]
    batch.lost = 20
    batch.check()


def marked(value: str) -> list[psutil.Process]:
    """Returns the processes whose environment variable MARK has a value."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("MARK") == value and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


@pytest.mark.heavy
def test_nothing_is_left_of_a_ray_of_its_own_when_the_batch_is_killed(tmp_path, ray_folder):
    batch = batch_on(None, tmp_path, 2000, is_painted=True)
    batch.start(MARK=str(tmp_path), RAY_TMPDIR=str(ray_folder))
    try:
        batch.wait_for_rows(3)
        assert len(marked(str(tmp_path))) > 3
    finally:
        kill(batch.process.pid)
    batch.process.wait()
    wait_until(lambda: not marked(str(tmp_path)))


# --- heavy ---

@contextlib.contextmanager
def nodes(count: int, bases: dict, folder: Path):
    """Yields a cluster of `count` machines."""
    first = next(iter(bases.values()))
    names = [f"node{index}" for index in range(count)]
    with running(dict.fromkeys(names, first), folder, connect=False) as cluster:
        yield cluster


@pytest.mark.heavy
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("is_painted", [True, False], ids=["painted", "drawn"])
def test_twenty_faults_at_random_moments(count, is_painted, bases, plain, ray_folder, tmp_path):
    chance = random.Random(count)
    with nodes(count, bases, ray_folder) as cluster:
        batch = batch_on(cluster, tmp_path, 1000 if is_painted else 80, is_painted, plain)
        batch.start()
        try:
            for _ in range(20):
                batch.wait_for_rows(chance.randrange(3))
                time.sleep(chance.random() * 2)
                if batch.ended():  # all rows are done: start from the beginning
                    assert batch.process.returncode == 0, batch.output()[-3000:]
                    batch.check()
                    batch.restart()
                chance.choice([batch.kill_worker, batch.kill_machine, batch.kill_driver])(chance)
            batch.finish()
        finally:
            kill(batch.process.pid)
        batch.check()
