"""What runs and is shown on GitHub."""
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

from devtools import ROOT, heavy
from devtools.commands import COMMANDS

FOLDER = ROOT / ".github"
WORKFLOWS = sorted(FOLDER.glob("workflows/*.yml"))


def content(path) -> dict:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_commands_that_there_are_and_may_only_read(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"python dev\.py (\w+)", text)) <= COMMANDS.keys()
    assert content(path)["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", used)
               for used in re.findall(r"uses: (.+)", text))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actionlint_finds_nothing(path):
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("needs actionlint")
    assert not subprocess.run([program, str(path)], capture_output=True, text=True).stdout


def test_the_oldest_python_and_that_of_comfyuis_builds_lint_and_test_on_three_systems():
    matrix = content(FOLDER / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'^requires-python = ">=(.+)"$', project, re.MULTILINE)[1]
    assert matrix["python"] == [oldest, "3.13"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "windows", "macos"}


def test_a_tag_is_published_only_where_it_is_the_version():
    steps = content(FOLDER / "workflows" / "publish.yml")["jobs"]["publish"]["steps"]
    pattern = re.search(r'grep -qx "(.+)" pyproject', steps[1]["run"])[1].replace('\\"', '"')
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    assert pattern.replace("${GITHUB_REF_NAME#v}", version) in project.splitlines()


def test_a_tag_is_published_only_where_the_tests_of_its_commit_have_passed():
    steps = content(FOLDER / "workflows" / "publish.yml")["jobs"]["publish"]["steps"]
    names = [step.get("name") or step["uses"].partition("@")[0] for step in steps]
    assert names.index("The commit has passed its tests") < names.index(
        "Comfy-Org/publish-node-action")
    assert "--workflow test.yml" in next(step["run"] for step in steps if "gh run" in str(step))


def test_six_nights_run_all_heavy_tests(monkeypatch):
    ran = []
    monkeypatch.setattr(heavy, "run_piece", lambda name, *_: ran.append(name) or {
        "passed": True, "seconds": 0, "bytes": 0, "result": ""})
    monkeypatch.setattr(heavy, "state", lambda files: "")
    for night in range(6):
        with tempfile.TemporaryDirectory() as folder:
            monkeypatch.setattr(heavy, "RECORD", Path(folder, "heavy.json"))
            assert not heavy.main(["--sixth", str(night)])
    assert sorted(ran) == sorted(heavy.pieces())


def test_a_report_asks_for_the_log_the_inspection_and_the_workflow():
    form = content(FOLDER / "ISSUE_TEMPLATE" / "problem.yml")
    labels = " ".join(field["attributes"]["label"] for field in form["body"]).lower()
    assert all(word in labels for word in ("log", "inspect model file", "workflow"))
