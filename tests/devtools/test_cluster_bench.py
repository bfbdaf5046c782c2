"""The measures of many machines run, at a tiny size."""
import json
import subprocess
import sys

import pytest

from devtools import ROOT

pytest.importorskip("ray")


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="its clusters need Linux")
def test_measures_give_figures(tmp_path):
    measures = ["memory", "scale", "resume"]  # speed takes minutes
    options = {"prompts": 2, "actors": 2, "tasks": 6, "sleep": 0.05, "rows": 6}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "devtools.measure.cluster_bench", *measures, *arguments,
                    "--out", str(tmp_path)], cwd=ROOT, check=True)
    figures = json.loads((tmp_path / "machines.json").read_text())
    assert all(figures[name]["ended"] == "done" and figures[name]["rows"]
               for name in measures)
