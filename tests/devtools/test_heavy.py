"""The heavy tests in pieces: what has passed is left out, what takes too much memory is ended."""
import pytest

from devtools import heavy

TEST = """
import pytest

@pytest.mark.{mark}
def test_it():
    {body}
"""


@pytest.fixture
def piece(tmp_path, monkeypatch):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser): parser.addoption('--heavy', action='store_true')")
    file = tmp_path / "test_it.py"
    monkeypatch.setattr(heavy, "pieces", lambda: {"tests/piece": [file]})
    monkeypatch.setattr(heavy, "RECORD", tmp_path / "heavy.json")
    return file


def test_a_piece_that_has_passed_runs_again_when_its_tests_change(piece, capfd):
    for body, code, runs in (("pass", 0, True), ("pass", 0, False), ("assert not 1", 1, True),
                             ("assert not 1", 1, True), ("assert 1", 0, True)):
        piece.write_text(TEST.format(mark="heavy", body=body))
        assert heavy.main([]) == code
        shown = capfd.readouterr().out
        assert ("Heavy tests of tests/piece" in shown) == runs
        assert f"1 {'failed' if code else 'passed'}" in shown.splitlines()[-1]


def test_a_test_without_the_mark_does_not_run(piece, capfd):
    piece.write_text(TEST.format(mark="other", body="assert not 1"))
    assert heavy.main([]) == 0 and "1 deselected" in capfd.readouterr().out


def test_a_piece_that_takes_too_much_memory_is_ended_and_says_so(piece, capfd):
    piece.write_text(TEST.format(mark="heavy", body="bytes(range(256)) * (4 << 20), "
                                 "__import__('time').sleep(600)"))
    assert heavy.main(["--most-gib", "0.5"]) == 1
    assert "ended: it took more than 0.5 GiB of memory" in capfd.readouterr().out


def test_a_folder_without_heavy_tests_is_refused(piece, capfd):
    with pytest.raises(SystemExit):
        heavy.main(["tests/another"])
    assert "they are in tests/piece" in capfd.readouterr().err


def test_pieces_run_at_the_same_time_and_each_is_in_the_table(piece, tmp_path, monkeypatch, capfd):
    files = {name: tmp_path / f"test_{name}.py" for name in "ab"}
    wait = ("import pathlib, time; pathlib.Path({own!r}).touch(); end = time.monotonic() + 60\n"
            "    while not pathlib.Path({other!r}).exists(): assert time.monotonic() < end")
    for name, other in ("ab", "ba"):
        files[name].write_text(TEST.format(mark="heavy", body=wait.format(
            own=str(tmp_path / name), other=str(tmp_path / other))))
    monkeypatch.setattr(heavy, "pieces", lambda: {name: [file] for name, file in files.items()})
    assert heavy.main(["--at-once", "2"]) == 0
    assert [line.split()[1] for line in capfd.readouterr().out.splitlines()[-2:]] == ["a", "b"]
