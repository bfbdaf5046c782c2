"""What breaks a rule is found by the inputs that are drawn, is made smaller, and is kept in a file
in which it is found again."""
from types import SimpleNamespace

import pytest

from devtools import commands
from devtools.fuzz.reader import Reader, fuzz

# One of about 170 inputs has the rarest fault, by the constants of the modules that are imported.
INPUTS = 3000
SEEN = {
    "error": "foreign, KeyError", "name": "does not name the file", "sentence": "is no sentence",
    "memory": "bytes of Python's objects", "allocation": "foreign, MemoryError|^memory",
    "time": "slow, ", "hang": "hangs, it was ended after 10", "wrote": "wrote, ",
    "abort": "the process ended with ", "opened": "opened, ", "network": "network, ",
    "process": "process, ", "uint16": "NotImplementedError: 'U16'",
    "uint32": "NotImplementedError: 'U32'", "uint64": "NotImplementedError: 'U64'"}


class Recorder(Reader):
    """Notes what is drawn."""

    def open(self, name: str):
        self.drawn = []
        return super().open(name)

    def read(self, data: bytes):
        self.drawn.append(data)
        super().read(data)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    with Recorder(tmp_path_factory.mktemp("planted"), "planted_targets", hangs=10) as reader:
        yield reader


@pytest.mark.parametrize("fault", SEEN)
def test_what_breaks_a_rule_is_found_and_its_file_breaks_it_again(reader, fault, tmp_path):
    with pytest.raises(AssertionError, match=SEEN[fault]) as error:
        fuzz(reader, fault, INPUTS, 1, found=tmp_path)
    kept, = (tmp_path / fault).iterdir()
    assert str(kept) in str(error.value)
    with pytest.raises(AssertionError, match=SEEN[fault]):
        fuzz(reader, fault, 1, 1, [kept], tmp_path / "again")
    assert reader.drawn[0] == kept.read_bytes()


def test_a_finding_is_made_smaller(reader, tmp_path):
    with pytest.raises(AssertionError):
        fuzz(reader, "error", INPUTS, 1, found=tmp_path)
    kept, = (tmp_path / "error").iterdir()
    first = next(data for data in reader.drawn if b"9" in data)
    assert b"9" in kept.read_bytes() != first and len(kept.read_bytes()) < 50  # of one change


def test_an_input_that_breaks_nothing_is_no_finding(reader, tmp_path):
    fuzz(reader, "nothing", 100, 1, found=tmp_path)
    assert len(reader.drawn) > 50 and not [*tmp_path.iterdir()]


def test_a_seed_draws_the_same_inputs_again_and_another_one_others(reader, tmp_path):
    drawn = []
    for seed in (1, 1, 2):
        fuzz(reader, "nothing", 30, seed, found=tmp_path)
        drawn.append(reader.drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_draws_a_seed_prints_it_and_takes_it_again(monkeypatch, capsys):
    runs = []
    environment = SimpleNamespace(run=lambda *arguments, **variables: runs.append(arguments) or 0)
    monkeypatch.setattr(commands, "prepare", lambda needed: environment)

    def run(*arguments):
        assert commands.fuzz([*arguments]) == 0
        return capsys.readouterr().out.partition("dev.py fuzz ")[2].split()

    again = run("-k", "gguf")
    assert run(*again, "-k", "gguf") == again != run("-k", "gguf")
    assert runs[0] == runs[1] != runs[2]
    assert again[1] in runs[0] and again[3] in runs[0] and runs[0][-2:] == ("-k", "gguf")
