"""Options that have other words than in earlier versions, and values of workflows of 0.2.1."""
import json
from pathlib import Path

import folder_paths
import pytest
from comfy.quant_ops import QUANT_ALGOS
from pack_nodes import node_list
from prompt_errors import LINK, prompt_errors

from devtools.workflows.api_format import widget_values
from featherweight.loaders.packing.calibration.measure import EACH_TYPE
from featherweight.loaders.paths.folders import list_measurements
from featherweight.nodes.load_diffusion_model import packed_type
from featherweight.nodes.renamed_options import RENAMED, current
from featherweight.nodes.save_packed_model import SavePackedModel

NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}
INPUTS = {node_id: {one.id: getattr(one, "input_override", one)
                    for one in node.GET_SCHEMA().inputs}
          for node_id, node in NODES.items()}
CHANGED = {(node_id, name): one.as_dict()[RENAMED] for node_id, inputs in INPUTS.items()
           for name, one in inputs.items() if RENAMED in one.as_dict()}
# Of each node in the workflows and blueprints of 0.2.1: the names of its widgets, then their values
# in each node that differs.
EARLIER = json.loads(
    Path(__file__).with_name("values_of_0_2_1.json").read_text(encoding="utf-8"))
MIX = "mix for a size"


def test_these_options_have_new_words():
    assert {(node_id.removeprefix("Featherweight"), *each): renamed[each[1]]
            for (node_id, name), renamed in CHANGED.items() for each in [(name, old)
            for old in renamed]} == {
        **{(loader, "pack_to", "as the file"): "no change" for loader in (
            "LoadDiffusionModel", "LoadCheckpoint", "LoadTextEncoder", "LoadControlNet",
            "LoadModelPatch", "LoadCLIPVision")},
        **{(loader, "pack_to", "size in GB"): MIX for loader in (
            "LoadDiffusionModel", "LoadCheckpoint", "LoadTextEncoder")},
        ("ApplyLora", "misfits", "apply the rest"): "skip",
        ("ApplyLora", "misfits", "fail"): "error",
        ("MeasureSensitivity", "thoroughness", "one run per layer"): "normal",
        ("MeasureSensitivity", "thoroughness", "no runs"): "fast",
        ("MeasureSensitivity", "thoroughness", EACH_TYPE): EACH_TYPE,
        **{(f"Place{part}", name, number): word for part in ("Model", "TextEncoder")
           for name, number, word in (("gpu_weights", "-1", "automatic"),
                                      ("gpu_weights", "1000", "all"), ("store_gb", "1000", "all"))},
        ("SavePackedModel", "type", "as it is"): "keep types",
        ("SavePackedModel", "type", "size in GB"): MIX,
        **{("SavePackedModel", "type", kept): kept for kept in ("asym_w4a8_int8",)
           if kept not in QUANT_ALGOS},
        **{("SavePackedModel", "type", f"{words}: {mix}"): f"{MIX}: {mix}"
           for words in ("size in GB", MIX) for mix in (
            "int8_convrot + asym_w4a8_int8", "int8_convrot + convrot_w4a4", "int8_convrot + nvfp4",
            "float8_e4m3fn + nvfp4", "mxfp8 + nvfp4")},
        ("SavePackedModel", "loras", "arrive whole"): "keep LoRA quality (larger)",
        ("SavePackedModel", "loras", "in the type asked for"): "keep the size",
        ("SavePackedModel", "measurement", ""): "none",
    }


@pytest.mark.parametrize(("node_id", "name"), [
    each for each in CHANGED if hasattr(INPUTS[each[0]][each[1]], "options")])
def test_an_old_word_is_accepted_and_is_not_offered(node_id, name):
    options = INPUTS[node_id][name].options
    for old, new in CHANGED[node_id, name].items():
        is_kept = CHANGED[node_id, name].get(new) == new  # accepted, though not offered
        assert (new in list(options) or is_kept) and old not in list(options)
        for value, accepted in ((old, True), (new, True), (f"{old} no more", False)):
            errors = prompt_errors(node_id, {name: value})
            refused = [error for error in errors
                       if error["extra_info"].get("input_name") == name]
            assert (not refused) == accepted, value


def test_old_words_of_pack_to_mean_what_they_meant():
    assert packed_type("as the file") is None is packed_type("no change")
    assert packed_type("size in GB", 5.5) == packed_type(MIX, 5.5) not in (None, "size in GB")
    assert packed_type("Q4_K") == "Q4_K"


def test_what_is_no_word_is_left_as_it_is():
    assert [current(value, {"a": "b"}) for value in ("a", "c", 5, None, ["a"])] == [
        "b", "c", 5, None, ["a"]]


def meaning(node_id: str, values: dict) -> dict:
    """Values in today's words."""
    return {name: current(value, CHANGED.get((node_id, name), {}))
            for name, value in values.items()}


@pytest.mark.parametrize("node_id", EARLIER)
def test_every_node_in_a_workflow_of_0_2_1_has_the_same_values(node_id):
    """By position, as the editor saves them; what the server then says of them is only that files
    are missing."""
    names, *rows = EARLIER[node_id]
    info = NODES[node_id].GET_NODE_INFO_V1()
    assert rows
    for row in rows:
        earlier = dict(zip(names, row, strict=True))
        if "sensitivity" in earlier:  # its place has the list now
            earlier["measurement"] = earlier.pop("sensitivity")
        today = widget_values({"widgets_values": row}, info)
        assert meaning(node_id, today) == meaning(node_id, earlier)
        sockets = {name: LINK for name, one in INPUTS[node_id].items()
                   if not one.optional and name not in today}
        for error in prompt_errors(node_id, {**sockets, **today}):
            name = error["extra_info"].get("input_name")
            assert name.endswith("_name") or name.startswith(("text_encoder", "mmproj")), error


@pytest.fixture
def measurements(tmp_path, monkeypatch):
    folder = tmp_path / "output" / "sensitivity"
    for name in ("b.sensitivity", "sub/A.sensitivity", "c.dat", "d.imatrix.gguf", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    models = tmp_path / "models"
    models.mkdir()
    for name in ("model.gguf", "model.imatrix.gguf", "model.sensitivity"):
        (models / name).touch()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for key in ("diffusion_models", "checkpoints"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(models)], {".gguf"}))
    return folder


def test_the_list_of_measurements_has_what_is_there(measurements):
    assert list_measurements() == ["b.sensitivity", "c.dat", "d.imatrix.gguf", "model.imatrix.gguf",
                                   "model.sensitivity", "sub/A.sensitivity"]
    choice = SavePackedModel.define_schema().inputs[-1].input_override
    assert choice.options == ["none", *list_measurements()] and choice.default == "none"


def test_a_measurement_that_an_old_workflow_names_is_taken_from_either_input(measurements):
    """At `sensitivity` a prompt had a text, or a link, which today's input takes too; a workflow
    had the text in the place of the list."""
    save = "FeatherweightSavePackedModel"
    for given in ({"sensitivity": "b.sensitivity"}, {"sensitivity": ""}, {"sensitivity": LINK},
                  {"measurement": "b.sensitivity"}, {"measurement": ""}, {"measurement": "none"},
                  {"measurement": LINK},
                  {"measurement": str(measurements / "b.sensitivity")},
                  {"measurement": r"sub\A.sensitivity"}):
        names = {error["extra_info"].get("input_name") for error in prompt_errors(save, given)}
        assert not names & given.keys(), given
    refused, = [error for error in prompt_errors(save, {"measurement": "gone.sensitivity"})
                if error["extra_info"].get("input_name") == "measurement"]
    assert "gone.sensitivity is in none of the folders of measurements" in refused["details"]
