"""Before a batch each machine's ComfyUI says whether it can run it, and names what it lacks."""
import os
import re

from devtools.cluster import workflow

import pytest

from devtools.files import demo_files
from featherweight.cluster import preflight
from featherweight.cluster.batch_run import Batch
from featherweight.cluster.comfyui_install import majority_versions, version_difference
from featherweight.cluster.preflight import (
    Checker,
    MachineReport,
    check_machines,
    file_changes,
    report,
)
from featherweight.cluster.ray_connection import on_node

ray = pytest.importorskip("ray")
INK = demo_files.LORAS["ink"]
NEWER = {"ComfyUI": "0.30.0", "torch": "2.13.0", "Featherweight": "0.2.0"}
PACK = """
class Little:
    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "little"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}
    def run(self, text):
        return (text,)
NODE_CLASS_MAPPINGS = {"LittleNode": Little}
"""


@pytest.fixture(scope="module")
def checked(cluster, bases, tmp_path_factory):
    """Yields (whether all machines can run it, the printed report).

    The desk lacks a node pack, the attic a LoRA, and both a file of a row.
    """
    lora = bases["attic"] / "models" / "loras" / INK
    pack = bases["attic"] / "custom_nodes" / "little_pack.py"
    target = os.readlink(lora)
    lora.unlink()
    pack.write_text(PACK, encoding="utf-8")
    printed = []
    rows = tmp_path_factory.mktemp("check") / "rows.jsonl"
    rows.write_text('{"id": "a"}\n{"id": "b", "1.model_name": "no_such.gguf"}\n', encoding="utf-8")
    graph = workflow() | {"20": {"class_type": "LittleNode", "inputs": {"text": "a"}}}
    try:
        batch = Batch(graph, str(rows), "", address=cluster.address, cpus=1, gpus=0,
                      say=lambda text, **_: printed.append(text))
        yield batch.check(), "\n".join(printed)
    finally:
        pack.unlink()
        os.symlink(target, lora)


def test_a_machine_is_named_with_the_files_and_nodes_that_it_lacks(checked):
    can_all_run, text = checked
    ink, model = f"'{INK}' (60.lora_name)", "'no_such.gguf' (1.model_name)"
    assert not can_all_run
    assert sorted(line for line in text.splitlines() if " has no " in line) == [
        f"attic has no file {ink} in the folders of its ComfyUI.",
        f"attic has no file {model} and no {ink} in the folders of its ComfyUI.",
        "desk has no node 'LittleNode': the pack it comes from is not installed or did not load."]


def test_the_table_says_what_each_machine_is(checked):
    head, *lines = checked[1].splitlines()
    columns = " ".join(head.split())
    assert columns == "machine ComfyUI torch Featherweight GPU free memory can run it"
    versions = r"\d+\.\d+\.\d+\s+\d+\.\d+\.\d+\S*\s+\d+\.\d+\.\d+"
    for name in ("desk", "attic"):
        row = rf"{name}\s+{versions}\s+none\s+[\d.]+ GB RAM\s+no"
        assert len([line for line in lines if re.fullmatch(row, line)]) == 1
    assert lines[-1] == "0 of 2 machines can run it."


@pytest.mark.heavy
def test_a_machine_is_asked_with_its_gpus_in_sight(cluster, bases, monkeypatch, capsys):
    """Rays hide GPUs from a process that reserves none: older ones, and all by this variable."""
    class VisibleDevices(Checker):
        def __init__(self, *_):
            self.visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")

        def check(self, *_):
            return {}, [self.visible]

    monkeypatch.setattr(preflight, "Checker", VisibleDevices)
    cluster.bases["cellar"] = bases["desk"]
    cluster.add("cellar", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1")
    try:
        visible = []
        for has_gpus in (True, False):
            machine = MachineReport("cellar", NEWER)
            check_machines({cluster.nodes["cellar"].node_id: machine}, {}, [], "", has_gpus)
            visible += machine.problems
        assert visible == ["all", ""]
        assert re.search(r"Machines checked: 100%\|.*\| 1/1 \[", capsys.readouterr().err)
    finally:
        cluster.remove("cellar")
        del cluster.bases["cellar"]


def test_a_machine_that_goes_away_cannot_run_it(cluster, bases):
    cluster.bases["cellar"] = bases["desk"]
    cluster.add("cellar")
    node = cluster.nodes["cellar"].node_id
    assert ray.get(ray.remote(lambda: 1).options(**on_node(node)).remote()) == 1
    cluster.remove("cellar")
    del cluster.bases["cellar"]
    machine = MachineReport("cellar", NEWER)
    check_machines({node: machine}, {}, [], "", False)
    assert not machine.can_run() and machine.problems[0].startswith("could not be asked: ")


def test_a_machine_of_other_versions_is_left_out():
    older = {**NEWER, "ComfyUI": "0.24.0"}
    expected = majority_versions([older, NEWER, NEWER])
    assert expected == NEWER
    shelf = MachineReport("shelf", older, version_difference(older, expected))
    assert shelf.sentences() == [
        "shelf has ComfyUI 0.24.0 where the others have 0.30.0: it takes no part."
    ]
    assert not shelf.can_run()
    # another build, and a version that is not known
    for alike in ({**NEWER, "torch": "2.13.0+cu130"}, {**NEWER, "Featherweight": ""}):
        assert version_difference(alike, expected) == ""
    assert majority_versions([older, {**NEWER, "torch": "2.13.0+cu130"}, NEWER]) == NEWER


def test_of_as_many_machines_of_two_versions_those_like_the_one_that_asks_are_taken():
    older = {**NEWER, "ComfyUI": "0.24.0"}
    assert (
        majority_versions([older, NEWER], NEWER)
        == majority_versions([NEWER, older], NEWER)
        == NEWER
    )
    assert majority_versions([older, NEWER], older) == older
    assert majority_versions([]) == {}


def test_where_all_can_run_it_that_is_said():
    machines = [
        MachineReport("desk", NEWER, memory={"ram": 8_000_000_000, "gpus": [("A card", 7e9, 8e9)]}),
        MachineReport("shelf", NEWER),
    ]
    assert report(machines).endswith("\n\nAll 2 machines can run it.")
    assert report(machines[:1]).endswith("\n\nThe machine can run it.")
    assert re.search(r"A card\s+7.0 of 8.0 GB \+ 8.0 GB RAM\s+yes", report(machines))


def test_of_many_problems_some_are_said_and_the_rest_counted():
    problems = [f"has no file '{index}.gguf'." for index in range(25)]
    sentences = MachineReport("attic", NEWER, problems=problems).sentences()
    assert len(sentences) == preflight.MAX_PROBLEMS + 1
    assert sentences[-1] == "attic has 15 more problems."


def test_what_is_asked_is_the_workflow_with_each_file_that_rows_name():
    graph = {
        "1": {
            "class_type": "Load",
            "inputs": {"name": "a.gguf", "lora": "a.safetensors", "strength": 1.0}
        },
        "2": {"class_type": "Text", "inputs": {"text": "a house", "model": ["1", 0]}}
    }
    rows = [{"1.name": "b.gguf", "2.text": "a red house"}, {"1.name": "c.gguf", "9.name": "d.gguf"},
            {"1.name": "b.gguf"}]

    assert file_changes(graph, []) == [{}] == file_changes(graph, [{"2.text": "a tree"}])
    assert file_changes(graph, rows) == [{"1.name": "b.gguf"}, {"1.name": "c.gguf"}]
    assert file_changes(graph, [*rows, {"2.text": "a tree"}]) == [
        {},
        {"1.name": "b.gguf"},
        {"1.name": "c.gguf"},
    ]
    lora = {"1.lora": "x.safetensors"}
    assert file_changes(graph, [{"1.name": name, **lora} for name in ("b.gguf", "c.gguf")]) == [
        {"1.name": "b.gguf", **lora}, {"1.name": "c.gguf", **lora}]
