"""A batch survives the end or failure of its driver, a worker, a machine or a disk."""
import json
import os
import signal
import subprocess
import sys
import time

from devtools.cluster import changes, make_base, running, workflow

import pytest
from process_tree import start_interruptible

from devtools import ROOT

from .test_batch_run import Run, graph_of, rows

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.heavy


class Command:
    """batch.py as a person calls it."""

    def __init__(self, folder, address, lines):
        self.out, self.log = folder / "out", folder / "log"
        (folder / "workflow.json").write_text(json.dumps(workflow()), encoding="utf-8")
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        self.command = [
            sys.executable,
            str(ROOT / "batch.py"),
            str(folder / "workflow.json"),
            str(folder / "rows.jsonl"),
            str(self.out), "--cpus", "1", "--gpus", "0", "--address", address
        ]

    def start(self):
        with open(self.log, "wb") as log:
            return start_interruptible(self.command, stdout=log, stderr=log)

    def wait_for(self, count, process=None):
        while len(self.records()) < count and (process is None or process.poll() is None):
            time.sleep(0.05)

    def records(self):
        """Returns id -> record of the rows that are done."""
        if not self.out.exists():
            return {}
        return {path.stem: json.loads(path.read_text()) for path in self.out.glob("*.json")}

    def output(self):
        return self.log.read_text(errors="replace")


def check_pictures(out, lines, plain):
    """Asserts that a folder has every row's picture, byte for byte, and no other file."""
    assert sorted(os.listdir(out)) == sorted(
        f"{row['id']}{end}" for row in lines for end in ("_9_0.png", ".json")
    )
    different = [row["id"] for row in lines
                 if (out / f"{row['id']}_9_0.png").read_bytes() != plain(graph_of(row))]
    assert different == []


def test_a_stopped_batch_says_how_to_go_on_and_a_killed_one_goes_on_too(cluster, tmp_path, plain):
    lines = rows(12)
    batch = Command(tmp_path, cluster.address, lines)
    process = batch.start()
    batch.wait_for(2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert "Stopped. What is in" in batch.output() and "go on" in batch.output()
    first = batch.records()
    assert 2 <= len(first) < 12
    assert not [name for name in os.listdir(batch.out) if name.endswith(".part")]
    process = batch.start()
    batch.wait_for(len(first) + 2, process)
    process.kill()
    process.wait()
    second = batch.records()
    assert batch.start().wait(600) == 0, batch.output()
    check_pictures(batch.out, lines, plain)
    last = batch.records()
    assert all(last[name] == record for name, record in {**first, **second}.items())  # drawn once


def test_forty_pictures_are_those_of_one_process(cluster, tmp_path, plain):
    run = Run(tmp_path, cluster.address)
    assert run(rows(40)) == {"drawn": 40}
    check_pictures(run.out, rows(40), plain)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="mounting a small disk takes root's rights")
def test_a_machine_with_a_full_disk_and_one_without_a_lora_are_named_and_the_others_finish(
        bases, ray_folder, tmp_path, plain):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]):
        pytest.skip("no small disk can be mounted here")
    lacking = make_base(tmp_path / "cellar", bases["desk"] / "models")
    next((lacking / "models" / "loras").glob("*pumpkins*")).unlink()
    try:
        (full / "rest").write_bytes(b"0" * (60 << 10))
        with running({**bases, "cellar": lacking}, ray_folder, connect=False,
                     started=["desk"]) as cluster:
            cluster.add("attic", TMPDIR=str(full))
            cluster.add("cellar")
            batch = Command(tmp_path, cluster.address, lines := rows(24))
            assert batch.start().wait(900) == 0, batch.output()
        check_pictures(batch.out, lines, plain)
        assert {record["worker"].split(":")[0] for record in batch.records().values()} == {"desk"}
        assert "attic has no space left on its disk" in batch.output()
        assert (
            "cellar has no file 'featherweight_demo_lora_pumpkins.safetensors' (61.lora_name)"
            in batch.output()
        )
    finally:
        subprocess.call(["umount", "-l", str(full)])


def test_changes_make_other_pictures():
    """The pictures that the tests above compare differ from each other."""
    assert len({json.dumps(changes(index)) for index in range(60)}) == 60
