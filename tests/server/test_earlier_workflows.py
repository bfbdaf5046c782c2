"""The example workflows of version 0.2.1 in today's editor."""
import io
import json
import shutil
import subprocess
import tarfile

import pytest
from editor import sent_by

from devtools import ROOT
from devtools.host.server import Server
from devtools.workflows.api_format import to_api
from devtools.workflows.stand_ins import stand_in_files
from featherweight.nodes.added_inputs import REPLACED
from featherweight.nodes.renamed_options import RENAMED, current

VERSION_0_2_1 = "b30b984d51b5"  # its last commit


@pytest.fixture(scope="module")
def earlier_examples(tmp_path_factory):
    """Returns the paths of the example workflows."""
    folder = tmp_path_factory.mktemp("0.2.1")
    archive = shutil.which("git") and subprocess.run(
        ["git", "archive", VERSION_0_2_1, "example_workflows"], cwd=ROOT, capture_output=True)
    if not archive or archive.returncode:
        pytest.skip("needs git and the history of the repository")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return sorted((folder / "example_workflows").glob("*.json"))


def in_todays_words(prompt: dict, object_info: dict) -> dict:
    """Returns a prompt with today's words for options that were renamed, and the connections of
    inputs that others replaced."""
    for node in prompt.values():
        inputs = {}
        for group in ("required", "optional"):
            inputs.update(object_info[node["class_type"]]["input"].get(group, {}))
        for name, value in node["inputs"].items():
            _, settings = [*inputs.get(name, ()), {}, {}][:2]
            node["inputs"][name] = current(value, settings.get(RENAMED, {}))
        for name, (_, *settings) in inputs.items():
            replaced = settings[0].get(REPLACED) if settings else None
            if replaced in node["inputs"]:
                node["inputs"][name] = node["inputs"].pop(replaced)
    return prompt


@pytest.mark.heavy
def test_every_example_of_0_2_1_opens_and_sends_the_values_that_it_has(
        earlier_examples, browser, tmp_path):
    stand_in_files(tmp_path, earlier_examples)
    wrong, changed = {}, {}
    with Server(tmp_path) as server:
        browser.open_editor(server)
        object_info = server.object_info()
        for path in earlier_examples:
            text = path.read_text(encoding="utf-8")
            browser.open_workflow(path.name, text)
            assert browser.types(), path.name
            if found := browser.complaints():
                wrong[path.name] = found
            expected = in_todays_words(to_api(json.loads(text), object_info), object_info)
            sent = sent_by(browser)
            assert sent.keys() == expected.keys(), path.name
            for node, part in expected.items():  # new inputs have their defaults in what is sent
                for name, value in part["inputs"].items():
                    if (now := sent[node]["inputs"].get(name)) != value:
                        changed[path.name, part["class_type"], name] = value, now
        browser.close_editor()
    assert len(earlier_examples) > 30
    assert not wrong
    assert not changed
