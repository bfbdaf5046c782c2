"""A run of the tests leaves nothing of tests that passed, one by one and in two processes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATION = Path(__file__).parents[1] / "pytest.ini"
SOURCE = """
import pytest

@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "large").write_bytes(bytes(1000))
    return folder

@pytest.mark.parametrize("number", range(3))
def test_that_writes(tmp_path, shared, number):
    (tmp_path / "large").write_bytes(bytes(1000))
    assert number != {failing}
"""


@pytest.mark.parametrize(("processes", "failing"), [((), None), (("-n", "2"), 1)],
                         ids=["one process", "two processes"])
def test_only_a_test_that_fails_leaves_its_folder(tmp_path, processes, failing):
    source, temporary = tmp_path / "test_source.py", tmp_path / "temporary"
    temporary.mkdir()
    source.write_text(SOURCE.format(failing=failing), encoding="utf-8")
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c",
            str(CONFIGURATION), "--rootdir",
            str(tmp_path), "--noconftest", *processes,
            str(source)
        ], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTEST_DEBUG_TEMPROOT": str(temporary), "PYTEST_ADDOPTS": ""})
    assert run.returncode == (failing is not None), run.stdout + run.stderr
    left = {
        path.parent.name for path in temporary.rglob("large")
        if path.parent.is_dir() and not path.parent.is_symlink()
    }
    assert {name for name in left if "that_writes" in name} == (
        set() if failing is None else {f"test_that_writes_{failing}_0"}
    )
    assert failing is not None or left == set()
