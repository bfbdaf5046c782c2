"""Which cases of tests run: heavy ones with `--heavy`; `--drawn` takes a few of tests with many,
others every day.

That concerns the folders below, whose cases take longest, but for files that take seconds whole.
Without it, as in a run of named files, all cases run; `dev.py test --heavy` runs all that `--drawn`
may leave out.
"""
import collections
import datetime
import itertools
import os
import random

import pytest

MOST = 2  # cases of a test
# of tests that start an editor for each case, and of the one that runs each example
MOST_OF_FILES = {"server/test_browser.py": 1, "server/test_workflow_runs.py": 12}
# files whose cases all take some seconds together
CHEAP = tuple(f"node/test_{name}.py" for name in (
    "added_inputs", "choices", "file_inputs", "help_pages", "legacy_kj", "locales", "nodes",
    "prompt_values", "renamed_options"))
FOLDERS = (*MOST_OF_FILES, "demo/", "devtools/", "node/", *(f"loaders/{name}/" for name in (
    "comfyui", "encoders", "files", "inspect", "lora", "models", "packing")), *(
    f"ops/{name}/" for name in ("kernels", "layers", "packing", "patcher", "patches", "tensor")))
DAY = "FEATHERWEIGHT_TEST_DAY"  # environment variable, the same in all processes of a run


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true",
                     help="also run tests that need minutes or gigabytes")
    parser.addoption("--drawn", action="store_true",
                     help=f"of each test in the larger folders run {MOST} cases, drawn by the day")


def pytest_configure(config):
    if config.getoption("--drawn"):
        os.environ.setdefault(DAY, datetime.date.today().isoformat())


def pytest_report_header(config):
    if config.getoption("--drawn"):
        return f"of each test in the larger folders {MOST} cases, the same with {DAY}={day()}"
    return None


def day() -> str:
    """Returns what the cases are drawn by."""
    return os.environ[DAY]


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    tests = collections.defaultdict(list)
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name.startswith(FOLDERS) and not name.startswith(CHEAP) and (
                "heavy" not in item.keywords):
            tests[name].append(item)
    left_out = set()
    for name, cases in tests.items():
        most = MOST_OF_FILES.get(name.partition("::")[0], MOST)
        if len(cases) > most:
            for case in cases:
                case.add_marker("more_with_heavy")
            if config.getoption("--drawn"):
                left_out |= set(cases) - set(random.Random(day() + name).sample(cases, most))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Leaves heavy cases out before they are made, by each process, to be deselected."""
    if not metafunc.config.getoption("--heavy"):
        marks = metafunc.definition.own_markers
        marks[:] = [_without_heavy(mark) if mark.name == "parametrize" else mark for mark in marks]


def _without_heavy(mark: pytest.Mark) -> pytest.Mark:
    names, values, *others = mark.args
    values, more = list(values), dict(mark.kwargs)
    stays = [not any(of_case.name == "heavy" for of_case in getattr(value, "marks", ()))
             for value in values]
    if not any(stays):
        stays = [True] * len(values)  # the test is deselected
    if isinstance(more.get("ids"), (list, tuple)):
        more["ids"] = list(itertools.compress(more["ids"], stays))
    kept = list(itertools.compress(values, stays))
    return pytest.mark.parametrize(names, kept, *others, **more).mark
