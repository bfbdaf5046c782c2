"""A batch on two machines draws what one ComfyUI draws, once for each row, whatever ends in the midst."""
import json
import os
import signal
import sys
import threading
import time

import pytest
from featherweight.machines.batch import Batch

from .conftest import changes, workflow

ray = pytest.importorskip("ray")
COUNT = 10


class Run:
    """A batch in a folder: its rows, what it said, and what is in OUT."""

    def __init__(self, folder, address, graph=None):
        self.folder, self.address, self.graph, self.said = folder, address, graph or workflow(), []
        self.out = folder / "out"

    def __call__(self, lines, **options):
        path = self.folder / "rows.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
        self.said = []
        return dict(Batch(self.graph, str(path), str(self.out), address=self.address, cpus=1, gpus=0,
                          say=lambda text, **_: self.said.append(text), **options).run())

    def names(self):
        return sorted(os.listdir(self.out))

    def records(self):
        return {path.stem: json.loads(path.read_text()) for path in self.out.glob("*.json")}


def rows(count=COUNT):
    return [{"id": f"{index:04}", **changes(index)} for index in range(count)]


def of(row):
    """The workflow of a row."""
    return workflow(row["4.text"], row["7.seed"])


def kill_first(run):
    """kill -9 the worker that drew the first picture."""
    while not (found := run.out.exists() and list(run.out.glob("*.json"))):
        time.sleep(0.02)
    os.kill(int(json.loads(found[0].read_text())["worker"].split(":")[1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def first(cluster, tmp_path_factory):
    """The first run: a worker is killed in the midst, and among the rows are some that nobody can draw."""
    run = Run(tmp_path_factory.mktemp("batch"), cluster.address)
    killer = threading.Thread(target=kill_first, args=(run,), daemon=True)
    killer.start()
    bad = ['{"id": "broken"', '["no row"]', '{"id": "../x", "7.seed": 1}', {"id": "0003", "7.seed": 99},
           {"id": "nowhere", "77.seed": 1}, {"id": "sampler", "7.sampler_name": "no_such_sampler"}]
    museum = tmp_path_factory.mktemp("museum")  # a machine with another ComfyUI
    (museum / "comfy").mkdir()
    (museum / "main.py").touch()
    (museum / "comfyui_version.py").write_text('__version__ = "0.1.0"\n', encoding="utf-8")
    cluster.bases["museum"] = museum
    cluster.add("museum", COMFYUI_PATH=str(museum))
    try:
        counts = run([*rows()[:5], *bad, *rows()[5:]])
    finally:
        cluster.remove("museum")
    killer.join(1)
    assert not killer.is_alive()
    return run, counts, list(run.said)


def test_every_row_is_there_once_and_byte_equal_to_one_comfyui(first, plain):
    run, counts, _ = first
    assert counts == {"drawn": COUNT, "failed": 6}
    assert run.names() == sorted(f"{row['id']}{end}" for row in rows() for end in ("_9_0.png", ".json"))
    for row in rows():
        assert (run.out / f"{row['id']}_9_0.png").read_bytes() == plain(of(row)), row


def test_both_machines_drew(first):
    assert {record["worker"].split(":")[0] for record in first[0].records().values()} == {"desk", "attic"}


def test_a_machine_of_another_version_is_left_out_and_named(first):
    assert [said for said in first[2] if said.startswith("museum has ComfyUI 0.1.0 where the others have ")
            and said.endswith("it takes no part.")]


@pytest.mark.parametrize("sentence", [
    "Line 6 is no JSON", "Line 7 is no row", "Line 8 has the id '../x', which cannot be a file's name",
    "Line 9 has the id '0003', as line 4 has", "Line 10 (nowhere): The workflow has no node 77", "sampler: node 7 (KSampler)"])
def test_a_bad_row_fails_alone_and_is_named(first, sentence):
    assert sum(said.startswith(sentence) for said in first[2]) == 1


def test_run_again_draws_nothing_and_starts_nothing(first, monkeypatch):
    monkeypatch.setattr(Batch, "connect", None)
    before = {name: (first[0].out / name).stat().st_mtime_ns for name in first[0].names()}
    assert first[0](rows()) == {"there": COUNT}
    assert {name: (first[0].out / name).stat().st_mtime_ns for name in first[0].names()} == before


def test_one_changed_row_is_drawn_again_and_no_other(first, plain):
    run, changed = first[0], rows()
    changed[4]["7.seed"] = 444
    before = {name: (run.out / name).read_bytes() for name in run.names()}
    (run.out / ".0004_9_0.png.0123abcd.part").write_bytes(b"half")  # of a process that was killed
    (run.out / ".other_9_0.png.0123abcd.part").write_bytes(b"half of another batch")
    assert run(changed, workers=(1, 1)) == {"there": COUNT - 1, "drawn": 1}
    assert (run.out / "0004_9_0.png").read_bytes() == plain(of(changed[4]))
    other = run.out / ".other_9_0.png.0123abcd.part"
    assert other.exists()
    other.unlink()
    assert [name for name in run.names() if (run.out / name).read_bytes() != before.get(name)] == ["0004.json", "0004_9_0.png"]


def test_who_stops_a_batch_while_ray_is_imported_imports_it_no_second_time(tmp_path, monkeypatch):
    class Refused:
        def find_spec(name, path, target=None):
            assert name != "ray"

    def stopped(self, rows):
        raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(sys, "meta_path", [Refused, *sys.meta_path])
    monkeypatch.setattr(Batch, "render", stopped)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, "local")(rows(1))
