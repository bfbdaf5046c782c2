"""A whole run takes a few cases of a test that has many, and says how to take the same again."""
import os
import re
import subprocess
import sys

import drawn_cases
import pytest

CONFTEST = """
import drawn_cases

def pytest_addoption(parser, pluginmanager):
    pluginmanager.register(drawn_cases)
"""
TESTS = """
import pytest

@pytest.mark.parametrize("case", range(50))
def test_many(case): pass

def test_one(): pass
"""
WHOLE = ("ops/formats/test_it.py", drawn_cases.CHEAP[0])


@pytest.fixture
def run(tmp_path):
    for file in ("ops/kernels/test_it.py", *WHOLE):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers =\n"
                                         "    heavy\n    more_with_heavy\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    support = os.path.dirname(drawn_cases.__file__)

    def names_of(*arguments: str, day: str = "2026-11-29") -> set[str]:
        output = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": support, drawn_cases.DAY: day}).stdout
        assert ("--drawn" in arguments) == (f"the same with {drawn_cases.DAY}={day}" in output)
        return set(re.findall(r"(\S+) PASSED", output))

    return names_of


def test_cases_are_drawn_by_the_day_and_named(run):
    found = run("--drawn")
    of_kernels = {name for name in found if "ops/kernels" in name and "many" in name}
    assert len(of_kernels) == drawn_cases.MOST
    assert len(found - of_kernels) == 1 + 51 * len(WHOLE)
    assert run("--drawn") == found != run("--drawn", day="2026-11-30")


def test_the_heavy_run_takes_all_cases_of_such_a_test(run):
    assert len(run()) == 51 * (1 + len(WHOLE))
    assert len(run("-m", "heavy or more_with_heavy")) == 50
