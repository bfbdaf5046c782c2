"""Before a batch each machine says what it is and what it lacks, by name; what it lacks of models can be sent to it."""
import os
import re

import pytest
from devtools.files import demo_files
from featherweight.machines import check
from featherweight.machines.check import (
    Lack,
    Look,
    Machine,
    conclusion,
    fetch_missing,
    lack,
    most,
    questions,
    report,
    survey,
    table,
    unlike,
)

from .conftest import workflow

ray = pytest.importorskip("ray")
INK = demo_files.LORAS["ink"]
OURS = ("FeatherweightLoadDiffusionModel", "model_name")
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
def looked(cluster, bases):
    """attic lacks a LoRA and a node pack; what was found before and after missing files were sent, and what was told."""
    lora, pack = bases["attic"] / "models" / "loras" / INK, bases["desk"] / "custom_nodes" / "little_pack.py"
    lora.unlink()
    pack.write_text(PACK, encoding="utf-8")
    graph = workflow() | {"20": {"class_type": "LittleNode", "inputs": {"text": "a"}}}
    told = []
    try:
        with Look({cluster.nodes[name].node_id: False for name in ("desk", "attic")}) as look:
            before = survey(look, *questions(graph))
            assert fetch_missing(*before, told.append) == []
            yield before, survey(look, *questions(graph, [{"1.model_name": "no_such.gguf"}])), told
    finally:
        pack.unlink()
        if not lora.exists():
            os.link(bases["desk"] / "models" / "loras" / INK, lora)


def test_a_machine_that_lacks_a_model_and_a_pack_is_named_with_both(looked):
    (machines, lacks), _, _ = looked
    desk, attic = machines
    size = os.path.getsize(os.path.join(desk.folders["loras"][0], INK))
    assert [machine.name for machine in machines] == ["desk", "attic"]
    assert not lacks[desk.node]
    assert lacks[attic.node].files == {("loras", "loras", INK): size}
    assert lacks[attic.node].sentence("attic") == (
        f"attic lacks {INK} ({check.in_words(size)}) in loras and the node LittleNode of little_pack.")
    assert conclusion(list(lacks.values())) == ("1 of 2 machines can run it. --fetch-models copies 1 missing file,"
                                                f" {check.in_words(size)}.")


def test_the_table_says_what_each_machine_is(looked):
    (machines, lacks), _, _ = looked
    head, desk, attic = table(machines, lacks).splitlines()
    assert head.split() == ["machine", "ComfyUI", "torch", "Featherweight", "GPU", "free", "memory", "can", "run", "it"]
    versions = r"\d+\.\d+\.\d+\s+\d+\.\d+\.\d+\S*\s+\d+\.\d+\.\d+"
    assert re.fullmatch(rf"desk\s+{versions}\s+none\s+[\d.]+ GB RAM\s+yes", desk)
    assert re.fullmatch(rf"attic\s+{versions}\s+none\s+[\d.]+ GB RAM\s+lacks 1 file, 1 node", attic)


def test_what_is_missing_is_sent_and_nothing_else(looked, bases):
    _, (machines, lacks), told = looked
    desk, attic = machines
    assert told == [f"{INK}, {check.in_words((bases['desk'] / 'models/loras' / INK).stat().st_size)}: from desk to attic"]
    assert (bases["attic"] / "models/loras" / INK).read_bytes() == (bases["desk"] / "models/loras" / INK).read_bytes()
    assert not lacks[attic.node].files and lacks[attic.node].nodes == {"LittleNode": "little_pack"}


def test_a_file_that_a_row_names_and_nobody_has_is_said_for_each(looked):
    """Our own loaders take any name when a prompt is checked; they would fail when it runs."""
    _, (machines, lacks), _ = looked
    assert [lacks[machine.node].sentence(machine.name) for machine in machines] == [
        "desk lacks no_such.gguf, which no machine has.",
        "attic lacks no_such.gguf, which no machine has and the node LittleNode of little_pack."]


def machine(name: str, versions: dict = NEWER, **known) -> Machine:
    return Machine(name, name, versions, {"gpus": [], "free": 8e9, "all": 9e9}, **known)


def found(size: int, *names: str, taken: bool = True) -> dict:
    """How a machine with such files answers for one input."""
    return {"taken": taken, "files": [("unet_gguf", "/models/unet", name, size) for name in names]}


@pytest.mark.heavy
def test_a_machine_is_asked_with_its_gpus_in_sight(cluster, bases, monkeypatch):
    """Older Rays hide them from a process that takes none for itself, as this variable of the machine does."""
    class Seeing(check.Asked):
        def name(self):
            return os.environ.get("CUDA_VISIBLE_DEVICES", "all")

    monkeypatch.setattr(check, "Asked", Seeing)
    cluster.bases["cellar"] = bases["desk"]
    cluster.add("cellar", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1")
    try:
        node = cluster.nodes["cellar"].node_id
        found = []
        for has_gpu in (True, False):
            with Look({node: has_gpu}) as look:
                found.append(ray.get(look.asked[node].name.remote(), timeout=60))
        assert found == ["all", ""]
    finally:
        cluster.remove("cellar")
        del cluster.bases["cellar"]


def test_a_machine_of_other_versions_is_left_out():
    older = {**NEWER, "ComfyUI": "0.24.0"}
    expected = most([older, NEWER, NEWER])
    assert expected == NEWER
    assert lack(machine("shelf", older), [], [], expected).sentence("shelf") == (
        "shelf has ComfyUI 0.24.0 where the others have 0.30.0: it takes no part.")
    for alike in ({**NEWER, "torch": "2.13.0+cu130"}, {**NEWER, "Featherweight": ""}):  # another build; nothing known
        assert not lack(machine("shelf", alike), [], [], expected)
    assert most([older, {**NEWER, "torch": "2.13.0+cu130"}, NEWER]) == NEWER


def test_of_as_many_machines_of_two_versions_those_like_the_one_that_asks_are_taken():
    older = {**NEWER, "ComfyUI": "0.24.0"}
    assert most([older, NEWER], NEWER) == most([NEWER, older], NEWER) == NEWER
    assert most([older, NEWER], older) == older
    assert most([]) == {}


def test_a_part_of_a_split_model_that_is_missing_is_named():
    parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    question = (*OURS, parts[0])
    machines = [machine("desk", choices={question: found(10 ** 9, *parts)}),
                machine("shelf", choices={question: found(10 ** 9, parts[0])})]
    assert lack(machines[1], machines, [], NEWER).sentence("shelf") == "shelf lacks m-00002-of-00002.gguf (1.0 GB) in unet."
    assert not lack(machines[0], machines, [], NEWER)


def test_a_choice_that_an_older_node_does_not_have_is_named():
    question = ("KSampler", "sampler_name", "newest")
    assert lack(machine("shelf", choices={question: found(0, taken=False)}), [machine("desk", choices={question: found(0)})],
                [], NEWER).sentence("shelf") == "shelf lacks the choice 'newest' of KSampler's sampler_name."


def test_files_of_one_name_and_other_sizes_are_said():
    question = (*OURS, "m.gguf")
    machines = [machine("desk", choices={question: found(10, "m.gguf")}),
                machine("shelf", choices={question: found(12, "m.gguf")})]
    assert unlike(machines) == ["unet/m.gguf is 10 bytes on desk and 12 bytes on shelf: their pictures will differ."]
    assert report(machines, {name: Lack() for name in ("desk", "shelf")}).endswith("differ.\nAll 2 machines can run it.")


def test_a_machine_that_cannot_be_asked_counts_as_one_that_cannot_run_it():
    lacks = [Lack(), Lack(trouble="did not answer within 600 s")]
    assert lacks[1].sentence("shelf") == "shelf: did not answer within 600 s."
    assert conclusion(lacks) == "1 of 2 machines can run it."


def test_what_is_asked_are_the_choices_of_the_workflow_and_the_files_that_rows_name():
    graph = {"1": {"class_type": "Load", "inputs": {"name": "a.gguf", "strength": 1.0}},
             "2": {"class_type": "Text", "inputs": {"text": "a house", "model": ["1", 0]}}}
    rows = [{"1.name": "b.gguf", "2.text": "a red house"}, {"1.name": "c.gguf", "2.text": "a blue house"}]
    assert questions(graph) == (["Load", "Text"], [("Load", "name", "a.gguf"), ("Text", "text", "a house")])
    assert questions(graph, rows) == (["Load", "Text"], [("Load", "name", "b.gguf"), ("Load", "name", "c.gguf")])
    assert questions(graph, [*rows, {"2.text": "a"}])[1][0] == ("Load", "name", "a.gguf")
