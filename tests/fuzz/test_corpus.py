"""Inputs that once broke something, read again, and a few new ones of each target: in one process
of their own."""
import json
import subprocess
import sys

import pytest

from devtools import ROOT
from devtools.fuzz.__main__ import CORPUS
from devtools.fuzz.targets import TARGETS
from featherweight.loaders.quantizers import registry

FILES = {name: sorted(map(str, (CORPUS / name).glob("*"))) for name in TARGETS}
NEW = 30  # inputs of each target beside those


@pytest.fixture(scope="module")
def replayed():
    return subprocess.run([sys.executable, "-m", "devtools.fuzz.worker", "--replay",
                           str(NEW)], cwd=ROOT, input=json.dumps(FILES), capture_output=True,
                          text=True)


def test_nothing_ends_the_process(replayed):
    assert replayed.returncode == 0, f"{replayed.stdout[-500:]}\n{replayed.stderr[-3000:]}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_is_read_or_refused_in_a_sentence(replayed, target):
    lines = [
        line for line in map(json.loads, replayed.stdout.splitlines()) if line["target"] == target
    ]
    assert lines[-1].get("input") == "new"
    assert [line for line in lines if "finding" in line] == []


def test_every_folder_of_the_corpus_is_of_a_target():
    folders = {path.name for path in CORPUS.iterdir()}
    assert folders and folders <= TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 500_000


def test_every_quantizer_of_the_registry_is_a_target():
    modules = {name for name, module in vars(registry).items()
               if getattr(module, "QUANTIZER", None) in registry.QUANTIZERS}
    assert len(modules) == len(registry.QUANTIZERS) and modules <= TARGETS.keys()
