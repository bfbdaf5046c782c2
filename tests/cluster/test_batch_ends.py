"""A batch goes on without a machine whose disk is full, and without one that lacks a file."""
import json
import os
import subprocess
import sys

from devtools.cluster import make_base, running, workflow

import pytest

from devtools import ROOT

from .test_batch_run import graph_of, rows

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.heavy


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="mounting a small disk takes root's rights")
def test_a_machine_with_a_full_disk_and_one_without_a_lora_are_named_and_the_others_finish(
        bases, ray_folder, tmp_path, plain):
    full, out, lines = tmp_path / "full", tmp_path / "out", rows(24)
    full.mkdir()
    workflow_file, rows_file = tmp_path / "workflow.json", tmp_path / "rows.jsonl"
    workflow_file.write_text(json.dumps(workflow()), encoding="utf-8")
    rows_file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
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
            done = subprocess.run(
                [sys.executable, str(ROOT / "batch.py"), workflow_file, rows_file, out, "--cpus",
                 "1", "--gpus", "0", "--address", cluster.address], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, timeout=900)
        assert done.returncode == 0, done.stdout
        assert sorted(os.listdir(out)) == sorted(
            f"{row['id']}{end}" for row in lines for end in ("_9_0.png", ".json"))
        assert [row["id"] for row in lines
                if (out / f"{row['id']}_9_0.png").read_bytes() != plain(graph_of(row))] == []
        records = [json.loads(path.read_text()) for path in out.glob("*.json")]
        assert {record["worker"].split(":")[0] for record in records} == {"desk"}
        assert "attic has no space left on its disk" in done.stdout
        assert (
            "cellar has no file 'featherweight_demo_lora_pumpkins.safetensors' (61.lora_name)"
            in done.stdout
        )
    finally:
        subprocess.call(["umount", "-l", str(full)])
