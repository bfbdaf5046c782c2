"""Inputs that name a file, of all nodes: when a file is missing, and when it has become another
one."""
import contextvars
import inspect

import folder_paths
import pytest
from comfy_api.latest import io
from pack_nodes import node_list

from featherweight.loaders import folders
from featherweight.nodes import FILE_INPUTS, apply_lora, load_text_encoder, remote_prompts

NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}
NOT_LOOKED_AT = {"FeatherweightInspectModelFile"}  # where a model is connected it needs no file
MISSING = "wan\\\\low noise.gguf"


def pickers(node) -> list[str]:
    return [
        input.id for input in node.GET_SCHEMA().inputs
        if isinstance(input, io.Combo.Input) and FILE_INPUTS.fullmatch(input.id)
    ]


WITH_FILES = [node_id for node_id, node in NODES.items() if pickers(node)]


def at_queue(node, **inputs):
    """What the host gets from a node before anything runs: it gives what the node's method names,
    all where it takes all."""
    taken = inspect.signature(node.validate_inputs).parameters
    if "inputs" not in taken:
        inputs = {name: inputs.get(name) for name, parameter in taken.items()
                  if name in inputs or parameter.default is parameter.empty}
    return node.validate_inputs(**inputs)


@pytest.mark.parametrize(
    "node_id", [node_id for node_id in WITH_FILES if node_id not in NOT_LOOKED_AT]
)
def test_a_file_that_is_missing_is_told_before_anything_runs(node_id):
    node = NODES[node_id]
    for name in pickers(node):
        others = dict.fromkeys(pickers(node))  # of links, whose values are not known yet
        assert at_queue(node, **others) is True
        said = at_queue(node, **{**others, name: MISSING})
        assert (
            "low noise.gguf is in none of the model folders" in said
            and "Put the file there, or pick another one" in said
        )


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
        return at_queue(NODES["UnetLoaderGGUF"], unet_name=MISSING)

    assert remote_prompts.RUN_ON_RAY in NODES
    assert (contextvars.copy_context().run(asked) is not True) is is_told


def test_a_lora_that_is_not_applied_need_not_be_there():
    assert (
        at_queue(apply_lora.ApplyLora, lora_name=MISSING, strength_model=0.0, strength_clip=0.0)
        is True
    )
    assert "low noise" in at_queue(
        apply_lora.ApplyLora, lora_name=MISSING, strength_model=0.0, strength_clip=1.0
    )
    assert (
        at_queue(apply_lora.ApplyLora, lora_name=MISSING, strength_model=None, strength_clip=0.0)
        is True
    )


def test_none_and_auto_are_no_files():
    names = {
        "text_encoder_1": "none", "text_encoder_2": "none", "text_encoder_3": None, "mmproj": "auto"
    }
    assert at_queue(load_text_encoder.LoadTextEncoder, **names) is True
    assert "low noise" in at_queue(load_text_encoder.LoadTextEncoder, **names | {"mmproj": MISSING})


@pytest.mark.parametrize(("node_id", "input", "value"), [
    ("CLIPLoaderGGUFMultiGPU", "type", "nonsense"), ("UNETLoaderMultiGPU", "weight_dtype", "bogus"),
    ("UnetLoaderGGUFAdvancedMultiGPU", "dequant_dtype", "fp16"),
    ("UnetLoaderGGUFAdvancedDisTorch2MultiGPU", "patch_dtype", "x"),
])
def test_a_choice_that_a_node_does_not_offer_is_told_before_anything_runs(node_id, input, value):
    message = at_queue(NODES[node_id], **{input: value})
    assert message.startswith(f"{input} is '{value}', expected one of: ")
    assert (
        at_queue(NODES[node_id], **{input: None, "device": "cuda:7", "compute_device": 3}) is True
    )


@pytest.mark.parametrize("node_id", NODES)
def test_inputs_that_offer_files_are_known_as_such_and_no_others(node_id, tmp_path, monkeypatch):
    """By what they offer where each folder has a file that no other input would offer."""
    for key in folder_paths.folder_names_and_paths:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key,
                            ([str(tmp_path)], {".gguf", ".safetensors"}))
    (tmp_path / "planted mmproj.gguf").touch()
    (tmp_path / "planted.safetensors").touch()
    offering = {
        input.id for input in NODES[node_id].define_schema().inputs
        if any("planted" in str(option) for option in getattr(input, "options", None) or ())
    }
    assert offering == set(pickers(NODES[node_id]))


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
