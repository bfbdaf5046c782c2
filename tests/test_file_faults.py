"""Every call on a file that loading and saving make fails once: one plain sentence, nothing left, and the next try is right."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """What makes calls fail, compiled."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("it takes Linux and a C++ compiler")
    built = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", built, FAULTS / "preload.cpp", "-ldl"], check=True)
    return built


@pytest.mark.heavy
@pytest.mark.parametrize("most", [3, 1000])
def test_each_fault_is_one_sentence_or_none_and_the_next_try_gives_the_same(library, tmp_path, most):
    tmp_path.chmod(0o700)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": os.pathsep.join([str(FAULTS.parent.parent), str(FAULTS.parent)])}
    done = subprocess.run([sys.executable, FAULTS / "process.py", library, tmp_path, str(most)], env=environment,
                          cwd=FAULTS.parent, stdout=subprocess.PIPE, text=True, timeout=3600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len({line["work"] for line in lines}) == 10
    assert [line for line in lines if line["wrong"]] == []
    assert all(line["failed"] for line in lines), [line["work"] for line in lines if not line["failed"]]
