"""What is killed in the midst of a batch costs time and nothing else: workers, machines, the batch
itself.

Quick: a painter in ComfyUI's place. Heavy: twenty faults at random moments, with it and with the
real one.
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
from pathlib import Path

from devtools.cluster import QUIET, changes, running, workflow

import psutil
import pytest

from devtools.host import server
from featherweight.cluster.graph import apply_changes

from .driver import painted

pytest.importorskip("ray")
DRIVER = Path(__file__).with_name("driver.py")
PATIENCE = 600  # seconds, on a machine that has much else to do
PAINT = {"1": {"class_type": "Paint", "inputs": {"text": "", "seed": 0, "seconds": 0.05}}}


def until(holds):
    """Wait until it holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not in {PATIENCE} s"
        time.sleep(0.05)


def kill(pid: int):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Broken:
    """A batch in a process of its own, and what breaks it. lost: how many rows may have been in
    flight when something ended."""

    def __init__(self, cluster, folder: Path, rows: list[dict], graph: dict, is_painted: bool,
                 draws):
        self.cluster, self.folder, self.rows, self.graph, self.draws = (
            cluster,
            folder,
            rows,
            graph,
            draws,
        )
        self.out, self.log, self.is_painted, self.lost = (
            folder / "out",
            folder / "log",
            is_painted,
            0,
        )
        (folder / "workflow.json").write_text(json.dumps(graph), encoding="utf-8")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                           encoding="utf-8")

    def start(self, **variables: str):
        command = [
            sys.executable,
            str(DRIVER),
            *(str(self.folder / name) for name in ("workflow.json", "rows.jsonl", "out")),
            self.cluster.address if self.cluster else "local",
            str(self.log), *["--painted"] * self.is_painted
        ]
        with open(self.folder / "said", "ab") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=said, cwd=self.folder,
                env={**os.environ, **QUIET, "COMFYUI_PATH": str(server.HOST), **variables})

    def said(self) -> str:
        return (self.folder / "said").read_text(encoding="utf-8")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def done(self) -> int:
        return len(list(self.out.glob("*.json"))) if self.out.exists() else 0

    def more(self, count: int = 1):
        """Wait until so many more rows are done, or all of them."""
        aim = min(self.done() + count, len(self.rows))
        until(lambda: self.done() >= aim or self.ended())

    def workers(self) -> list[psutil.Process]:
        found = []
        for node in self.cluster.nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                found += [
                    process for process in psutil.Process(raylet(node)).children(recursive=True)
                    if "Renderer" in process.cmdline()[0]
                ]
        return found

    def kill_worker(self, chance: random.Random):
        if found := self.workers():
            self.lost += 1
            kill(chance.choice(found).pid)

    def kill_machine(self, chance: random.Random):
        """The raylet of any machine but the one where the batch is called; it comes back."""
        name = chance.choice(list(self.cluster.nodes)[1:])
        self.lost += 1
        kill(raylet(self.cluster.nodes[name]))
        self.cluster.remove(name)
        self.more(chance.randrange(3))
        self.cluster.add(name)

    def kill_driver(self, chance: random.Random):
        self.lost += len(self.cluster.nodes)
        kill(self.process.pid)
        self.process.wait()
        self.start()

    def again(self):
        """Everything anew."""
        shutil.rmtree(self.out)
        self.log.unlink()
        self.lost = 0
        self.start()

    def finish(self) -> dict:
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, self.said()[-3000:]
        return self.counts()

    def counts(self) -> dict:
        """What the batch counted at its end; Ray may have said something behind it."""
        return json.loads([line for line in self.said().splitlines() if line.startswith("{")][-1])

    def check(self):
        """Every row once and right, nothing else, and no more drawn twice than was in flight."""
        names = {
            f"{row['id']}{end}" for row in self.rows
            for end in (".json", "_1_0.png" if self.is_painted else "_9_0.png")
        }
        assert set(os.listdir(self.out)) == names
        for row in self.rows:
            assert (
                self.out / f"{row['id']}_{'1' if self.is_painted else '9'}_0.png"
            ).read_bytes() == self.draws(row), row
        counts = collections.Counter(line.split()[0] for line in self.log.read_text().splitlines())
        assert len(self.rows) <= counts["begins"] <= len(self.rows) + self.lost


def raylet(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def batch_on(cluster, folder: Path, count: int, is_painted: bool, plain=None) -> Broken:
    graph = PAINT if is_painted else workflow()
    rows = [{
        "id": f"{index:04}",
        **({"1.text": changes(index)["4.text"], "1.seed": index} if is_painted else changes(index))
    } for index in range(count)]

    def draws(row):
        asked = apply_changes(graph,
                              {place: value for place, value in row.items() if place != "id"})
        return painted(asked) if is_painted else plain(asked)

    return Broken(cluster, folder, rows, graph, is_painted, draws)


def test_a_worker_a_machine_and_the_batch_itself_are_killed(cluster, tmp_path):
    found, chance = batch_on(cluster, tmp_path, 60, is_painted=True), random.Random(1)
    found.start()
    try:
        for fault in (found.kill_worker, found.kill_machine, found.kill_driver):
            found.more(5)
            fault(chance)
        assert "failed" not in found.finish()
    finally:
        kill(found.process.pid)
    found.check()


@pytest.mark.heavy
def test_a_row_that_ends_its_worker_each_time_fails_alone(cluster, tmp_path):
    found = batch_on(cluster, tmp_path, 12, is_painted=True)
    rows = [*found.rows[:5], {"id": "crash", "1.text": "crash"}, *found.rows[5:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found.start()
    try:
        found.process.wait(PATIENCE)
    finally:
        kill(found.process.pid)
    said = found.said().splitlines()
    assert found.counts() == {"drawn": 12, "failed": 1}, said
    assert [line for line in said if line.startswith("crash: its worker ended")]
    found.lost = 20
    found.check()


def marked(value: str) -> list[psutil.Process]:
    """Processes that were started with this mark around them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("MARK") == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.heavy
def test_nothing_is_left_of_a_ray_of_its_own_when_the_batch_is_killed(tmp_path, ray_folder):
    found = batch_on(None, tmp_path, 2000, is_painted=True)
    found.start(MARK=str(tmp_path), RAY_TMPDIR=str(ray_folder))
    try:
        found.more(3)
        assert len(marked(str(tmp_path))) > 3
    finally:
        kill(found.process.pid)
    found.process.wait()
    until(lambda: not marked(str(tmp_path)))


# --- heavy ---

@contextlib.contextmanager
def nodes(count: int, bases: dict, folder: Path, late: int = 0):
    """That many machines, the last `late` of them not yet started."""
    first = next(iter(bases.values()))
    names = [f"node{index}" for index in range(count)]
    with running(dict.fromkeys(names, first), folder, connect=False,
                 started=names[:count - late]) as found:
        yield found


@pytest.mark.heavy
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("is_painted", [True, False], ids=["painted", "drawn"])
def test_twenty_faults_at_random_moments(count, is_painted, bases, plain, ray_folder, tmp_path):
    chance = random.Random(count)
    with nodes(count, bases, ray_folder) as cluster:
        found = batch_on(cluster, tmp_path, 1000 if is_painted else 80, is_painted, plain)
        found.start()
        try:
            for _ in range(20):
                found.more(chance.randrange(3))
                time.sleep(chance.random() * 2)
                if found.ended():  # all are drawn: begin anew
                    assert found.process.returncode == 0, found.said()[-3000:]
                    found.check()
                    found.again()
                chance.choice([found.kill_worker, found.kill_machine, found.kill_driver])(chance)
            found.finish()
        finally:
            kill(found.process.pid)
        found.check()


@pytest.mark.heavy
def test_a_machine_that_joins_in_the_midst_draws_and_one_comes_back(
    bases, plain, ray_folder, tmp_path
):
    with nodes(3, bases, ray_folder, late=1) as cluster:
        found = batch_on(cluster, tmp_path, 60, False, plain)
        found.start()
        try:
            found.more(2)
            cluster.add("node2")
            found.more(2)
            found.lost += 1
            cluster.remove("node1")
            found.more(6)
            cluster.add("node1")
            found.finish()
        finally:
            kill(found.process.pid)
        found.check()
        assert {
            json.loads(path.read_text())["worker"].split(":")[0]
            for path in found.out.glob("*.json")
        } >= {"node0", "node2"}
