"""A batch on two machines renders each row once, as one ComfyUI does, even if a worker dies."""
import contextlib
import json
import os
import signal
import sys

from devtools.cluster import changes, workflow

import pytest

from featherweight.cluster.batch_rows import scan_rows
from featherweight.cluster.batch_run import Batch
from featherweight.cluster.picture_store import Store
from featherweight.cluster.worker import RowRenderer

ray = pytest.importorskip("ray")
COUNT = 8


class Run:
    """A batch in a folder: its rows, the lines it prints, and what is in OUT."""

    def __init__(self, folder, address, graph=None):
        self.folder = folder
        self.address = address
        self.graph = graph or workflow()
        self.out = folder / "out"
        self.printed = []

    def __call__(self, lines, **options):
        path = self.folder / "rows.jsonl"
        path.write_text(
            "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
            encoding="utf-8")
        self.printed = []
        return dict(
            Batch(self.graph, str(path), str(self.out), address=self.address, cpus=1, gpus=0,
                  say=lambda text, **_: self.printed.append(text), **options).run())

    def names(self):
        return sorted(os.listdir(self.out))

    def records(self):
        return {path.stem: json.loads(path.read_text()) for path in self.out.glob("*.json")}


def rows(count=COUNT):
    return [{"id": f"{index:04}", **changes(index)} for index in range(count)]


def graph_of(row):
    """Returns the workflow of a row."""
    return workflow(row["4.text"], row["7.seed"])


def killed_once(marker) -> type[RowRenderer]:
    """Returns a renderer class; the first worker to begin a second row kills itself.

    Args:
        marker: a file that the killed worker leaves.
    """
    class KilledOnce(RowRenderer):
        has_drawn = False

        def render(self, graph, row):
            if self.has_drawn:
                with contextlib.suppress(FileExistsError), open(marker, "x"):
                    os.kill(os.getpid(), signal.SIGKILL)
            answer = super().render(graph, row)
            self.has_drawn = True
            return answer

    return KilledOnce


@pytest.fixture(scope="module")
def museum(cluster, tmp_path_factory):
    """Adds a machine that has another version of ComfyUI."""
    folder = tmp_path_factory.mktemp("museum")
    (folder / "comfy").mkdir()
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.1.0"\n', encoding="utf-8")
    cluster.bases["museum"] = folder
    cluster.add("museum", COMFYUI_PATH=str(folder))
    yield
    cluster.remove("museum")
    del cluster.bases["museum"]


EARLIER = b"what an earlier run drew"
OTHER_PART = ".other_9_0.png.0123abcd.part"  # a half-written file of another batch


@pytest.fixture(scope="module")
def first(cluster, museum, tmp_path_factory):
    """Returns (run, counts, printed lines) of a run that continues an earlier one.

    That had rendered row 0000, and row 0004 with another seed. A worker is killed during the run,
    and some of the rows are invalid.
    """
    folder = tmp_path_factory.mktemp("batch")
    run, earlier = Run(folder, cluster.address), rows()
    earlier[4]["7.seed"] = 444
    store = Store(str(run.out))
    lines = [(number, json.dumps(row).encode()) for number, row in enumerate(earlier, 1)]
    for name, _, stamp, _ in scan_rows(str(run.out), run.graph, lines).pending:
        if name in ("0000", "0004"):
            store.save(name, {"9_0.png": EARLIER, "9_1.png": EARLIER}, {"stamp": stamp})
    for name in (OTHER_PART, ".0004_9_0.png.0123abcd.part"):
        (run.out / name).write_bytes(b"half")
    bad = [
        '{"id": "broken"', '["no row"]', '{"id": "../x", "7.seed": 1}',
        {"id": "0003", "7.seed": 99}, {"id": "nowhere", "77.seed": 1},
        {"id": "sampler", "7.sampler_name": "no_such_sampler"}
    ]
    counts = run([*rows()[:5], *bad, *rows()[5:]], worker=killed_once(str(folder / "killed")))
    assert (folder / "killed").exists()
    return run, counts, list(run.printed)


def test_every_row_is_there_once_and_byte_equal_to_one_comfyui(first, plain):
    run, counts, _ = first
    assert counts == {"done": 1, "drawn": COUNT - 1, "failed": 6}
    names = {f"{row['id']}{end}" for row in rows() for end in ("_9_0.png", ".json")}
    assert run.names() == sorted(names | {"0000_9_1.png", OTHER_PART})
    for row in rows()[1:]:
        assert (run.out / f"{row['id']}_9_0.png").read_bytes() == plain(graph_of(row)), row


def test_what_an_earlier_run_drew_is_left_as_it_is(first):
    assert [(first[0].out / f"0000_9_{number}.png").read_bytes() for number in (0, 1)] == [
        EARLIER
    ] * 2


def test_both_machines_drew(first):
    workers = [record.get("worker", "") for record in first[0].records().values()]
    assert {worker.split(":")[0] for worker in workers if worker} == {"desk", "attic"}


def test_a_machine_of_another_version_is_left_out_and_named(first):
    assert [
        line for line in first[2]
        if line.startswith("museum has ComfyUI 0.1.0 where the others have ")
        and line.endswith("it takes no part.")
    ]


@pytest.mark.parametrize(
    "sentence",
    [
        "Line 6 is not valid JSON",
        "Line 7 is not a row: expected an object",
        "Line 8 has the id '../x', which cannot be a file's name",
        "Line 9 has the id '0003', as line 4 has",
        "Line 10 (nowhere): The workflow has no node 77",
        "sampler: node 7 (KSampler)",
    ],
)
def test_a_bad_row_fails_alone_and_is_named(first, sentence):
    assert sum(line.startswith(sentence) for line in first[2]) == 1


def test_run_again_draws_nothing_and_starts_nothing(first, monkeypatch):
    monkeypatch.setattr(Batch, "connect", None)
    before = {name: (first[0].out / name).stat().st_mtime_ns for name in first[0].names()}
    assert first[0](rows()) == {"done": COUNT}
    assert {name: (first[0].out / name).stat().st_mtime_ns for name in first[0].names()} == before


def test_who_stops_a_batch_while_ray_is_imported_imports_it_no_second_time(tmp_path, monkeypatch):
    class Refused:
        @staticmethod
        def find_spec(name, path, target=None):
            assert name != "ray"

    def stopped(self, rows):
        raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setattr(sys, "meta_path", [Refused, *sys.meta_path])
    monkeypatch.setattr(Batch, "render", stopped)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, "local")(rows(1))
