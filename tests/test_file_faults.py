"""Every call on a file that loading and saving make fails once: one plain sentence, nothing left,
and the next try is right."""
import json
import os
import subprocess
import sys

import faults
import pytest


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return faults.compiled(tmp_path_factory.mktemp("faults"))


@pytest.mark.heavy
@pytest.mark.parametrize("most", [3, 1000])
def test_each_fault_is_one_sentence_or_none_and_the_next_try_gives_the_same(
        library, tmp_path, most):
    tmp_path.chmod(0o700)
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(faults.FOLDER.parent.parent), str(faults.FOLDER.parent)]
        ),
    }
    done = subprocess.run(
        [sys.executable, faults.FOLDER / "process.py", library, tmp_path,
         str(most)], env=environment, cwd=faults.FOLDER.parent, stdout=subprocess.PIPE, text=True,
        timeout=3600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len({line["work"] for line in lines}) == 14
    assert [line for line in lines if line["wrong"]] == []
    assert all(line["failed"]
               for line in lines), [line["work"] for line in lines if not line["failed"]]
