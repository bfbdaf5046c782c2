"""The sample of mutants stays where lines move, and a run says which of them the tests kill."""
import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

from devtools.mutants import running, sampling
from devtools.mutants.related_tests import TestMap
from devtools.mutants.results import Results, compare

TOY = '''"""A file to plant faults in: 1 + 1."""
import logging

log = logging.getLogger()


def area(width: int | None, height: int) -> int:
    if width is None or height < 0:
        return 0
    log.debug("%d", 2 * width)
    return width * height


def untested(value):
    return value + value + 7
'''
TOY_TEST = '''
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))
from ops.toy import area


def test_area():
    assert area(3, 5) == 15


def test_nothing():
    assert (area(None, 5), area(2, 0), area(2, -1)) == (0, 0, 0)


def test_that_fails_without_a_mutant():
    assert area(3, 5) == 16
'''
ENDLESS = """
import pathlib
import subprocess


def test():
    command = [{python!r}, "-c", "import time; time.sleep(90)"]
    process = subprocess.Popen(command, start_new_session=True)
    path = pathlib.Path('{pid}')
    path.with_suffix(".partial").write_text(str(process.pid))
    path.with_suffix(".partial").rename(path)
    process.wait()
"""
ROOMS = {"ops": ("ops",)}


def write(root, **files):
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path):
    pytest.importorskip("cosmic_ray")
    write(tmp_path, ops__toy=TOY, tests__ops__test_toy=TOY_TEST)
    return tmp_path


@pytest.fixture
def repository(tree):
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    commit(tree)
    return tree


def commit(tree):
    for command in (["add", "ops", "tests"], ["commit", "-qm", "Toy"]):
        subprocess.run(["git", "-c", "user.name=toy", "-c", "user.email=toy@localhost", *command],
                       cwd=tree, check=True)


def is_running(pid):
    """Whether a process still runs that was killed a moment ago."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            time.sleep(0.1)
        return True
    return False


def order(tree, seed=1):
    return list(sampling.Room(tree, ("ops",)).ordered(seed))


def test_the_order_stays_where_lines_move_and_follows_from_the_seed(tree):
    before = order(tree)
    assert len(before) > 8 and order(tree) == before != order(tree, seed=2)
    head, first, second = TOY.replace("\ndef", "\n# def").split("# ")
    write(tree, ops__toy=f"{head}# A line more.\n{second}\n\n{first}")
    assert order(tree) == before


def test_what_says_nothing_to_a_test_is_not_mutated(tree):
    spots = sampling.find_spots("ops/toy.py", TOY)
    assert {spot.place.text for spot in spots} == {
        "if width is None or height < 0:",
        "return 0",
        "return width * height",
        "return value + value + 7",
    }
    assert {spot.place.occurrence for spot in spots if spot.place.text.endswith("+ 7")} == {0, 1}


def test_every_mutant_is_other_python(tree):
    room = sampling.Room(tree, ("ops",))
    sources = [room.plant(mutant) for mutant in room.ordered(1)]
    assert TOY not in sources and len(set(sources)) == len(sources)


def test_a_mutant_whose_line_went_is_replaced_by_the_next_and_one_whose_file_was_renamed_is_found(
        tree):
    mutants = order(tree)
    sample = sampling.draw_sample(tree, 1, "", 4, ROOMS)
    (tree / "ops" / "toy.py").unlink()
    gone = mutants[1].place.text
    write(tree, ops__renamed=TOY.replace(gone, f"{gone}  # another line"))
    fitted = sampling.fit_sample(sample, "ops", sampling.Room(tree, ("ops",)))
    assert [sampled for sampled, _ in fitted] == mutants[:4]
    for sampled, mutant in fitted:
        assert mutant.place.file == "ops/renamed.py" and mutant.place.text != gone
        same = sampling.replace(mutant.place, file="ops/toy.py") == sampled.place
        assert same == (sampled.place.text != gone)
    assert len({mutant for _, mutant in fitted}) == 4


def test_the_sample_in_the_tree_is_as_it_is_written(tmp_path):
    path = running.Path(sampling.__file__).with_name("sample.json")
    sample = json.loads(path.read_text(encoding="utf-8"))
    assert {name: len(entries) for name, entries in sample["rooms"].items()} == dict.fromkeys(
        sampling.ROOMS, 100
    )
    sampling.write_sample(tmp_path / "sample.json", sample)
    assert (tmp_path / "sample.json").read_bytes() == path.read_bytes()


def test_a_run_says_what_the_tests_kill_and_goes_on_where_it_was(repository, tmp_path, monkeypatch):
    sample, out = sampling.draw_sample(repository, 1, "", 100, ROOMS), tmp_path / "results.json"
    first = running.run(repository, sample, "HEAD", out, ROOMS, limit=2)
    assert len(first["mutants"]) == 2
    assert first["tests"]["tests/ops/test_toy.py"]["failing"] == [
        "tests/ops/test_toy.py::test_that_fails_without_a_mutant"]
    monkeypatch.setattr(running.Tests, "_measure", lambda tests, clone, file: first["tests"][file])
    content = running.run(repository, sample, "HEAD", out, ROOMS, processes=2)
    assert content == json.loads(out.read_text()) and content["mutants"][:2] == first["mutants"]
    assert len(content["mutants"]) == len(sample["rooms"]["ops"])
    for entry in content["mutants"]:
        outcome = "survived" if entry["mutant"]["definition"] == "untested" else "killed"
        if "height < 0" not in entry["mutant"]["text"]:  # of which some change nothing
            assert entry["outcome"] == outcome, entry
    assert any(entry["by"] == "tests/ops/test_toy.py::test_area" for entry in content["mutants"])
    assert (repository / "ops" / "toy.py").read_text() == TOY


def test_results_of_another_commit_are_not_mixed(tmp_path):
    Results(tmp_path / "results.json", "a", 1).add_test(
        "tests/test_toy.py", {"seconds": 1.0, "failing": []}
    )
    with pytest.raises(SystemExit,
                       match="has results of commit a with seed 1, not of b with seed 1"):
        Results(tmp_path / "results.json", "b", 1)


def test_tests_that_run_in_a_circle_are_ended_with_what_they_started(tree, tmp_path):
    write(tree, tests__test_endless=ENDLESS.format(python=sys.executable, pid=tmp_path / "pid"))
    assert (
        running.Clone(tree, tmp_path / "t").run_tests("tests/test_endless.py", limit=10)[0] is None
    )
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_run_that_is_stopped_keeps_no_result_of_what_it_ended(repository, tmp_path):
    write(
        repository, tests__ops__test_toy=ENDLESS.format(python=sys.executable, pid=tmp_path / "pid")
    )
    commit(repository)
    sample, out = sampling.draw_sample(repository, 1, "", 1, ROOMS), tmp_path / "results.json"
    sampling.write_sample(tmp_path / "sample.json", sample)
    call = (
        "import sys, json, pathlib; from devtools.mutants import __main__ as main, running; "
        "main.ROOT = pathlib.Path(sys.argv[1]); main.ROOMS = {'ops': ('ops',)};"
        " main.main(sys.argv[2:])"
    )
    process = subprocess.Popen([
        sys.executable, "-c", call,
        str(repository), "run", "--sample",
        str(tmp_path / "sample.json"), "--out",
        str(out)
    ], cwd=running.Path(sampling.__file__).parents[2], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 1
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_the_tests_of_a_source_are_named_after_it_or_say_its_names_then_the_nearest(tmp_path):
    write(tmp_path, ops__alpha="def one_of_its_names(): ID = 'NodeOfThisName'",
          ops__beta="from . import alpha", ops__far="from .beta import x", cluster__gamma="",
          tests__helper="from featherweight.ops import alpha", tests__ops__test_alpha_of_rows="",
          tests__test_far="", tests__test_workflow="'NodeOfThisName'",
          tests__ops__test_x="from featherweight.ops.far import y",
          tests__ops__test_y="from helper import z",
          tests__cluster__test_z="START = 'from featherweight.cluster import gamma'",
          tests__server__test_server="")
    tests = TestMap(tmp_path)
    assert tests.tests_of("ops/alpha.py") == [
        "tests/ops/test_alpha_of_rows.py",
        "tests/test_workflow.py",
        "tests/ops/test_y.py",
        "tests/ops/test_x.py",
        "tests/server/test_server.py",
    ]
    assert tests.tests_of("ops/far.py")[:2] == ["tests/test_far.py", "tests/ops/test_x.py"]
    assert tests.tests_of("cluster/gamma.py") == [
        "tests/cluster/test_z.py",
        "tests/server/test_server.py",
    ]


def entry(number, outcome, replaced=False):
    place = {
        "file": "ops/toy.py", "definition": "", "family": "AddNot", "text": f"if {number}:",
        "occurrence": 0
    }
    mutant = {**place, "operator": "AddNot", "variant": 0}
    return {
        "room": "ops", "sampled": mutant, "mutant": mutant, "replaced": replaced, "line": number,
        "outcome": outcome, "by": ""
    }


def test_test_files_that_do_not_run_without_a_mutant_are_named(repository, tmp_path, capsys):
    sample = sampling.draw_sample(repository, 1, "", 1, ROOMS)
    write(repository, tests__ops__test_toy="import nothing_of_this_name")
    commit(repository)
    content = running.run(repository, sample, "HEAD", tmp_path / "results.json", ROOMS)
    assert content["mutants"][0]["outcome"] == "survived" and content["mutants"][0]["tests"] == []
    assert "Not usable without a mutant either: tests/ops/test_toy.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcomes", "fine", "lost"),
    [
        ("killed survived", True, 0),
        ("survived killed", True, 1),
        ("survived survived", False, 1),
        ("timeout timeout", True, 0),
    ],
)
def test_a_comparison_names_what_survives_now(outcomes, fine, lost):
    before = {"commit": "a", "mutants": [entry(1, "killed"), entry(2, "survived")]}
    after = {
        "commit": "b",
        "mutants": [entry(number, outcome) for number, outcome in enumerate(outcomes.split(), 1)]
    }
    report, not_lower = compare(before, after)
    assert not_lower == fine and f"\n{lost} killed before and surviving now" in report
    assert ("ops/toy.py:1 in the module, AddNot: if 1:" in report) == bool(lost)


def test_a_mutant_that_took_the_place_of_another_is_not_called_lost():
    report, fine = compare({"commit": "a", "mutants": [entry(1, "killed")]},
                           {"commit": "b", "mutants": [entry(1, "survived", replaced=True)]})
    assert (
        not fine and "0 killed before and surviving now" in report and "1 of 1 replaced" in report
    )
