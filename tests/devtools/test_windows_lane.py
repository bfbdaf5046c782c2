"""The lane for Windows: what turns it red, and what is in no repository."""
import subprocess

import pytest
import tomllib

from devtools import ROOT
from devtools.host.server import HOST
from devtools.windows import lane, portable
from devtools.windows.missing_in_wine import complex_numbers

KNOWN = tomllib.loads(lane.KNOWN.read_text(encoding="utf-8"))["tests"]


@pytest.mark.parametrize(("report", "code", "expected"), [
    ("passed a.py::b\nfailed a.py::c[1]", 1, 0),
    ("failed a.py::b\nfailed a.py::c[1]", 1, 1),  # another one
    ("passed a.py::b\npassed a.py::c[1]", 0, 1),  # mended
    ("passed a.py::b\nskipped a.py::c[1]", 0, 0),
    ("", 0, 1), ("", 5, 5), ("passed a.py::b", 3, 3),  # of no test, or of pytest itself
])
def test_the_lane_is_red_where_another_test_fails_or_one_of_the_table_passes(
        report, code, expected):
    known = {"tests": [{"test": "a.py::c[*]", "kind": "wine", "reason": "why"}]}
    assert lane.judge(report, known, code) == expected


def test_each_row_of_the_table_has_a_kind_and_a_reason():
    assert len(KNOWN) <= 40
    assert all(row.keys() == {"test", "kind", "reason"} and row["kind"] in ("wine", "test")
               and len(row["reason"]) > 10 for row in KNOWN)


def test_nothing_that_windows_runs_is_in_the_repository():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.split("\n")
    assert tracked and not [name for name in tracked if name.lower().endswith((
        ".dll", ".exe", ".pyd", ".msi", ".whl"))]


def test_every_function_of_complex_numbers_has_a_type_of_each_width():
    names = complex_numbers.functions()
    assert {"cabs", "cabsf", "cabsl", "csqrtf", "cpowl", "_Cbuild", "_FCmulcc", "norm"} <= {*names}
    assert all(f" own_{name}(" in source for name, source in names.items())


def test_readme_and_comfyuis_portable_version_are_as_the_lane_takes_them():
    clone, install = portable.commands_of_readme()
    assert clone.startswith("git clone ") and install.startswith(r".\python_embeded\python.exe -s ")
    bats = HOST / ".ci" / portable.BATS
    assert len([*bats.glob("run_*.bat")]) > 1 and portable.other_starts(bats) == []
