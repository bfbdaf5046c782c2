"""Inputs that name a file, of all nodes: when a file is missing, and when it has become another
one."""
import collections
import contextvars
import functools
import json
import os
import re
from pathlib import Path

import folder_paths
import pytest
from comfy_api.latest import io
from model_folders import use_empty_folders
from prompt_errors import LINK, NODES, errors_by_node, input_errors, prompt_errors

from featherweight import nodes
from featherweight.loaders.paths import folders
from featherweight.nodes import FILE_INPUTS, load_diffusion_model, remote_prompts
from featherweight.nodes.file_inputs import ADD_A_FILE, NO_OPTIONS

NOT_LOOKED_AT = {"FeatherweightInspectModelFile"}  # where a model is connected it needs no file
MISSING = "wan\\\\low noise.gguf"


def pickers(node) -> list[str]:
    return [
        input.id for input in node.GET_SCHEMA().inputs
        if isinstance(input, io.Combo.Input) and FILE_INPUTS.fullmatch(input.id)
    ]


WITH_FILES = [node_id for node_id, node in NODES.items() if pickers(node)]


@pytest.mark.parametrize(
    "node_id", [node_id for node_id in WITH_FILES if node_id not in NOT_LOOKED_AT]
)
def test_a_file_that_is_missing_is_told_at_its_own_input_before_anything_runs(node_id):
    for name in pickers(NODES[node_id]):
        others = dict.fromkeys(pickers(NODES[node_id]))
        assert input_errors(node_id, **others) == {}
        errors = input_errors(node_id, **{**others, name: MISSING})
        if "Stack" in node_id:  # whether a slot is used depends on other inputs
            assert errors.keys() == {"lora_name_1"}
        else:
            assert errors.keys() == {name}
        assert all("low noise.gguf" in message for message in errors.values())


@pytest.mark.parametrize("node_id", WITH_FILES)
def test_a_list_without_a_file_says_what_to_do_and_that_is_no_file(node_id, tmp_path, monkeypatch,
                                                                   caplog):
    use_empty_folders(tmp_path, monkeypatch, "vae_approx")
    for input in NODES[node_id].define_schema().inputs:
        if input.id not in pickers(NODES[node_id]):
            continue
        notice = input.as_dict().get(NO_OPTIONS)
        assert (notice is None) == bool(input.options)
        if notice is None:
            continue
        folder, = re.findall(rf"^{ADD_A_FILE}(\w+), then press R$", notice)
        assert folder in folder_paths.folder_names_and_paths and f"models/{folder}" in input.tooltip
        caplog.clear()
        assert notice not in input.options and not caplog.text  # nobody looks for it
    script = Path(nodes.__file__).parent / "web" / "saved_values.js"
    text = script.read_text(encoding="utf-8")
    assert f'NO_FILE = "{ADD_A_FILE}"' in text and NO_OPTIONS in text


@pytest.mark.parametrize(("node_id", "names"), [
    ("FeatherweightLoadDiffusionModel", ["model_name", "module_name"]),
    ("FeatherweightLoadTextEncoder", ["text_encoder_1", "text_encoder_2", "text_encoder_3",
                                      "mmproj"]),
    ("QuadrupleCLIPLoaderGGUF", ["clip_name1", "clip_name2", "clip_name4"]),
    ("DualCLIPLoaderGGUFDisTorch2MultiGPU", ["clip_name1", "clip_name2"]),
    ("GGUFLoaderKJ", ["model_name", "extra_model_name"]),
    ("NunchakuTextEncoderLoaderV2", ["text_encoder1", "text_encoder2"]),
    ("VaeGGUF", ["vae_name"]), ("FeatherweightCheckLora", ["lora_name"]),
])
def test_each_missing_file_is_no_value_of_its_list_and_the_log_says_where_it_was_sought(
        node_id, names, caplog):
    """The editor offers the file of a workflow's link where ComfyUI says so, and merges these
    errors with those of ComfyUI's own loaders."""
    given = {name: f"gone {number}.gguf" for number, name in enumerate(names)}
    rest = dict.fromkeys(input.id for input in NODES[node_id].GET_SCHEMA().inputs)
    errors = {error["extra_info"].get("input_name"): error["type"]
              for error in prompt_errors(node_id, {**rest, **given})}
    assert {name: errors.get(name) for name in names} == dict.fromkeys(names, "value_not_in_list")
    for name in given.values():
        assert f"{name} is in none of the model folders" in caplog.text
    assert "Put the file there, or pick another one; press R" in caplog.text


def test_all_missing_loras_of_a_stack_are_in_one_sentence_at_the_first():
    """Which slots are used depends on other inputs."""
    errors = input_errors("NunchakuFluxLoraStack", lora_name_1="gone 0.gguf",
                          lora_name_3="gone 1.gguf")
    message, = errors.values()
    assert errors.keys() == {"lora_name_1"}
    assert "gone 0.gguf and gone 1.gguf are in none of the model folders" in message


def test_files_that_two_nodes_miss_are_told_at_each_of_them():
    def loader(first):
        return {"class_type": "DualCLIPLoaderGGUF",
                "inputs": {"clip_name1": first, "clip_name2": "gone.gguf", "type": "flux"}}
    errors = errors_by_node({"1": loader("lost.gguf"), "2": loader(LINK)})
    missing = {node: {error["extra_info"]["input_name"] for error in found}
               for node, found in errors.items()}
    assert missing == {"1": {"clip_name1", "clip_name2"}, "2": {"clip_name2"}}


@pytest.mark.parametrize(
    ("graph", "is_told"),
    [
        ({"1": {"class_type": "UnetLoaderGGUF"}}, True),
        ({"1": {"class_type": remote_prompts.RUN_ON_RAY}}, False),
        (None, True),
        ({"1": None}, True),
        ([], True),
    ],
)
def test_files_of_a_prompt_that_runs_on_other_machines_need_not_be_here(graph, is_told):
    def asked():
        request = {"prompt": graph}
        assert remote_prompts.on_prompt(request) is request
        loader = load_diffusion_model.LoadDiffusionModel
        return {MISSING in input.options for input in loader.define_schema().inputs
                if input.id in ("model_name", "module_name")}

    assert remote_prompts.RUN_ON_RAY in NODES
    assert contextvars.copy_context().run(asked) == {not is_told}


def test_a_lora_that_is_not_applied_need_not_be_there():
    def errors(**strengths):
        return input_errors("FeatherweightApplyLora", lora_name=MISSING, **strengths)
    assert errors(strength_model=0.0, strength_clip=0.0) == {}
    assert errors(strength_model=0.0, strength_clip=1.0).keys() == {"lora_name"}
    assert errors(strength_model=None, strength_clip=0.0) == {}


def test_none_and_auto_are_no_files():
    names = {
        "text_encoder_1": None, "text_encoder_2": "none", "text_encoder_3": "none", "mmproj": "auto"
    }
    assert input_errors("FeatherweightLoadTextEncoder", **names) == {}
    assert prompt_errors("FeatherweightLoadTextEncoder", {
        "text_encoder_1": LINK, "type": "flux", "text_encoder_2": None}) == []


@pytest.mark.parametrize("node_id", NODES)
def test_a_device_of_another_machine_is_accepted_before_a_node_runs(node_id):
    devices = [input.id for input in NODES[node_id].GET_SCHEMA().inputs if "device" in input.id
               and isinstance(input, io.Combo.Input)]
    assert input_errors(node_id, **dict.fromkeys(devices, "cuda:7")) == {}


@pytest.mark.parametrize(("node_id", "input", "value"), [
    ("CLIPLoaderGGUFMultiGPU", "type", "nonsense"), ("UNETLoaderMultiGPU", "weight_dtype", "bogus"),
    ("UnetLoaderGGUFAdvancedMultiGPU", "dequant_dtype", "fp16"),
    ("UnetLoaderGGUFAdvancedDisTorch2MultiGPU", "patch_dtype", "x"),
])
def test_a_choice_that_a_node_does_not_offer_is_told_before_anything_runs(node_id, input, value):
    assert input_errors(node_id, **{input: value}).keys() == {input}
    assert not any(error["extra_info"]["input_name"] == input
                   for error in prompt_errors(node_id, {input: None}))


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_that_offer_files_are_known_as_such_and_no_others(node_id, tmp_path, monkeypatch):
    """By what they offer where each folder has a file that no other input would offer."""
    for key in folder_paths.folder_names_and_paths:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key,
                            ([str(tmp_path)], {".gguf", ".safetensors"}))
    (tmp_path / "planted mmproj.gguf").touch()
    (tmp_path / "planted.safetensors").touch()
    (tmp_path / "planted.sensitivity").touch()
    offering = {
        input.id for input in NODES[node_id].define_schema().inputs
        if any("planted" in str(option) for option in getattr(input, "options", None) or ())
    }
    assert offering == set(pickers(NODES[node_id]))


@pytest.mark.parametrize("node_id", NODES)
def test_the_host_describes_each_node(node_id):
    """It copies a node's description, with the options, and writes it as JSON."""
    inputs = NODES[node_id].GET_NODE_INFO_V1()["input"]
    described = json.loads(json.dumps(inputs))
    for input in NODES[node_id].GET_SCHEMA().inputs:
        if isinstance(input, io.Combo.Input):
            section = "optional" if input.optional else "required"
            kind, settings = described[section][input.id]
            # as newer nodes have it, or as older ones
            offered = settings["options"] if kind == "COMBO" else kind
            assert offered == list(input.options)


def test_a_description_of_all_nodes_reads_a_folder_once_for_each_list(tmp_path, monkeypatch):
    use_empty_folders(tmp_path, monkeypatch, "vae_approx")
    packages = tmp_path / "diffusion_models" / "packages"
    for number in range(3):
        (packages / str(number)).mkdir(parents=True)
        (packages / str(number) / "config.json").write_text('{"_class_name": "DiT"}')
        (packages / str(number) / "model.safetensors").touch()
    read, scandir, map_file = collections.Counter(), os.scandir, folders.map_file

    def counted(function, path):
        read[str(path)] += 1
        return function(path)

    monkeypatch.setattr(os, "scandir", functools.partial(counted, scandir))
    monkeypatch.setattr(folders, "map_file", functools.partial(counted, map_file))
    with folder_paths.cache_helper:  # as ComfyUI does for its answer
        for node in NODES.values():
            node.GET_NODE_INFO_V1()
    of_packages = {path: count for path, count in read.items() if path.startswith(str(packages))}
    # the models of three keys, one of which has another's folder
    assert len(of_packages) == 7 and max(of_packages.values()) <= 3


def test_a_choice_named_like_a_folder_of_models_runs_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models",
                        ([str(tmp_path)], {".gguf"}))
    folders.register_folders()
    (tmp_path / "flux").mkdir()
    for node_id, inputs in (("CLIPLoaderGGUF", {"clip_name": "t5.gguf", "type": "flux"}),
                            ("FeatherweightSavePackedModel",
                             {"type": "flux", "filename_prefix": "flux", "folder": "flux"})):
        before = NODES[node_id].fingerprint_inputs(**inputs)
        (tmp_path / "flux" / f"{node_id}.gguf").touch()
        assert NODES[node_id].fingerprint_inputs(**inputs) == before
