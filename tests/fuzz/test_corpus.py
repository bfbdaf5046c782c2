"""Inputs that once broke something, read again, and a few new ones of each target: in one process of their own."""
from pathlib import Path

import pytest
from devtools.fuzz.__main__ import CORPUS, child
from devtools.fuzz.targets import TARGETS

FILES = {name: sorted(map(str, (CORPUS / name).glob("*"))) for name in TARGETS}
NEW = 60  # inputs of each target beside those


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """(how the process ended, what it found, its output)"""
    job = {"targets": [*TARGETS], "executions": NEW, "seconds": 30, "seed": 1, "atheris": False,
           "findings": str(tmp_path_factory.mktemp("findings")), "corpus": None, "replay": FILES}
    ended, _, told, log = child(job)
    return ended, told.get("findings", []), log


def test_nothing_ends_the_process(findings):
    ended, _, log = findings
    assert not ended, log[-3000:]


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_is_read_or_refused_in_a_sentence(findings, target):
    assert [found for found in findings[1] if found.startswith(f"{target}/")] == []


def test_every_folder_of_the_corpus_is_of_a_target():
    folders = {path.name for path in Path(CORPUS).iterdir()}
    assert folders and folders <= TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 500_000
