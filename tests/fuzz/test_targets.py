"""Past findings, and new inputs that Hypothesis makes of valid ones, are read or refused.

Here the seed is always the same; `python3 dev.py fuzz` draws one, and more inputs.
"""
import pytest

from devtools.fuzz.reader import CORPUS, Reader, fuzz
from devtools.fuzz.targets import TARGETS
from featherweight.loaders.quantizers import registry

SEED = 1


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with Reader(tmp_path_factory.mktemp("fuzz")) as reader:
        yield reader


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_is_read_or_refused_in_a_sentence(reader, target, pytestconfig):
    fuzz(reader, target, pytestconfig.getoption("--fuzz"),
         int(pytestconfig.getoption("--hypothesis-seed") or SEED),
         sorted((CORPUS / target).glob("*")))


def test_every_folder_of_the_corpus_is_of_a_target():
    folders = {path.name for path in CORPUS.iterdir()}
    assert folders and folders <= TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 500_000


def test_every_quantizer_of_the_registry_is_a_target():
    modules = {name for name, module in vars(registry).items()
               if getattr(module, "QUANTIZER", None) in registry.QUANTIZERS}
    assert len(modules) == len(registry.QUANTIZERS) and modules <= TARGETS.keys()
