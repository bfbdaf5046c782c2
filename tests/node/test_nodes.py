"""Nodes: what they are called, what they take, and how they stand beside other packs."""
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path

import folder_paths
import pytest
import windows_rules
from comfy_api.latest import io
from legacy_ids import INPUTS, NAME, OUTPUTS
from pack_api import WeightFileError
from pack_nodes import current_nodes, ids_in_source, node_list

import featherweight.nodes
import nodes as host_nodes
from devtools import ROOT
from featherweight.loaders.container.weight_file import map_file
from featherweight.loaders.models.pack_on_load import LOAD_TYPES
from featherweight.loaders.paths import folders
from featherweight.nodes import help_pages, release_files_on_error
from featherweight.nodes.remote_prompts import watch_prompts

NODES = {node.GET_SCHEMA().node_id: node for node in node_list()}


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_and_every_input_says_what_it_is(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    assert (
        schema.description and schema.display_name and schema.category.startswith("Featherweight")
    )
    assert all(input.tooltip for input in schema.inputs)


def test_the_first_level_of_the_menu_has_what_most_people_look_for():
    schemas = {node_id: node.GET_SCHEMA() for node_id, node in NODES.items()}
    deeper = {node_id for node_id, schema in schemas.items()
              if schema.category != "Featherweight" and not schema.is_deprecated}
    assert deeper == {"FeatherweightLoadModelPatch", "FeatherweightLoadCLIPVision"}


def test_ids_of_other_packs_and_of_earlier_versions_are_deprecated_nodes_and_no_others():
    assert {
        node_id for node_id, node in NODES.items() if node.GET_SCHEMA().is_deprecated
    } == INPUTS.keys() | {"FeatherweightMeasureSpeed"}
    assert INPUTS.keys() == {
        node_id for node_id in NODES if not node_id.startswith("Featherweight")
    }


@pytest.mark.parametrize("node_id", NODES)
def test_no_input_changes_by_itself_when_a_workflow_has_run(node_id):
    inputs = NODES[node_id].INPUT_TYPES()
    for name, (_, options) in (inputs["required"] | inputs.get("optional", {})).items():
        # without the option, the editor changes a number of this name after each run
        default = name in ("seed", "noise_seed")
        assert not options.get("control_after_generate", default)


def test_every_id_is_found_in_the_source_by_comfyui_manager():
    assert sorted(ids_in_source()) == sorted(NODES)


def test_comfyui_managers_list_has_every_current_id_with_its_name():
    listed = json.loads((ROOT / "node_list.json").read_text(encoding="utf-8"))
    schemas = [node.GET_SCHEMA() for node in current_nodes()]
    names = {schema.node_id: schema.display_name for schema in schemas}
    assert listed == names, "run `python -m devtools.llms_text`"


# Inputs of our own loaders in the order in which workflows that people saved have their values. A
# later one comes last.
OWN_INPUTS = {
    "FeatherweightLoadDiffusionModel": ["model_name", "compute", "disable_dynamic_vram", "pack_to"],
    "FeatherweightLoadCheckpoint": [
        "checkpoint_name", "compute", "disable_dynamic_vram", "pack_to"
    ], "FeatherweightLoadTextEncoder": [
        "text_encoder_1", "type", "text_encoder_2", "text_encoder_3", "text_encoder_4", "mmproj",
        "device", "disable_dynamic_vram", "pack_to"
    ]
}


@pytest.mark.parametrize("node_id", OWN_INPUTS)
def test_later_inputs_of_a_loader_come_last_and_change_nothing_where_a_workflow_lacks_them(node_id):
    inputs = NODES[node_id].GET_SCHEMA().inputs
    assert [input.id for input in inputs][:len(OWN_INPUTS[node_id])] == OWN_INPUTS[node_id]
    pack_to = next(input for input in inputs if input.id == "pack_to")
    assert (
        pack_to.optional
        and pack_to.default == "no change"
        and pack_to.options == ["no change", "fit this GPU", *LOAD_TYPES, "mix for a size"]
    )
    assert {"fit this GPU", "mix for a size"} < {*featherweight.nodes.TO_A_SIZE}
    assert inputs[-1].id == "size_gb" and inputs[-1].optional
    parameters = inspect.signature(NODES[node_id].execute).parameters
    assert parameters["pack_to"].default == "no change"


FACES = {
    "LoadDiffusionModel": ["model_name", "pack_to"],
    "LoadCheckpoint": ["checkpoint_name", "pack_to"],
    "LoadTextEncoder": ["text_encoder_1", "type", "text_encoder_2", "pack_to"],
    "LoadControlNet": ["control_net_name", "pack_to"],
    "LoadModelPatch": ["model_patch_name", "pack_to"],
    "LoadCLIPVision": ["clip_name", "pack_to"],
}


@pytest.mark.parametrize("loader", FACES)
def test_the_face_of_a_loader_is_what_is_loaded_and_what_it_is_packed_to(loader):
    inputs = NODES[f"Featherweight{loader}"].GET_SCHEMA().inputs
    assert [one.id for one in inputs if not one.advanced
            and one.id != "size_gb"] == FACES[loader]  # which the editor shows with a mix alone


@pytest.mark.parametrize("node_id", INPUTS)
def test_legacy_nodes_take_the_inputs_and_have_the_defaults_that_shared_workflows_rely_on(node_id):
    schema = NODES[node_id].GET_SCHEMA()
    assert [input.id for input in schema.inputs] == list(INPUTS[node_id])
    assert [output.io_type for output in schema.outputs] == OUTPUTS[node_id]
    for input in schema.inputs:
        default = INPUTS[node_id][input.id]
        assert default is NAME or input.default == default
        # whose devices an API file names too
        assert input.optional or default is NAME or "Advanced" in node_id


def test_legacy_ids_stand_back_when_another_pack_holds_them(monkeypatch):
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", object)
    # a reload of our own
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "FeatherweightLoadDiffusionModel", object)
    ids = {node.GET_SCHEMA().node_id for node in node_list()}
    assert ids == NODES.keys() - {"UnetLoaderGGUF"}


@pytest.mark.parametrize(("file", "gone", "source"), [
    ("apply_lora", "FeatherweightApplyLora", "raise RuntimeError('broken on import')"),
    ("legacy.kjnodes", "GGUFLoaderKJ",
     "from comfy_api.latest import io\n"
     "class Broken(io.ComfyNode):\n"
     "    @classmethod\n"
     "    def define_schema(cls):\n"
     "        raise RuntimeError('broken schema')\n"),
])
def test_a_node_file_that_fails_is_named_and_the_others_load(
    tmp_path, monkeypatch, caplog, source, file, gone
):
    package, _, name = f"featherweight.nodes.{file}".rpartition(".")
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(sys.modules[package], "__path__",
                        [str(tmp_path), *sys.modules[package].__path__])
    monkeypatch.delitem(sys.modules, f"{package}.{name}")
    monkeypatch.delattr(sys.modules[package], name)
    assert {node.GET_SCHEMA().node_id for node in node_list()} == NODES.keys() - {gone}
    assert f"nodes/{file.replace('.', '/')}.py" in caplog.text


@pytest.mark.parametrize(("ask", "consequence"), [
    (lambda nodes: watch_prompts(), "Run on Ray needs the model files on this machine too"),
    (help_pages.serve, "nodes under the ids of other packs have no help page")])
def test_a_server_that_lacks_a_method_costs_what_needs_it_and_no_more(
    ask, consequence, monkeypatch, caplog
):
    nodes = node_list()
    monkeypatch.setitem(
        sys.modules, "server",
        types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=object())))
    for _ in range(2):
        ask(nodes)
    record, = caplog.records
    assert (
        f"So {consequence}. Update both" in record.getMessage()
        and "has no attribute" in record.getMessage()
    )
    monkeypatch.setitem(sys.modules, "server", types.SimpleNamespace())  # as in a script
    ask(nodes)
    assert len(caplog.records) == 1


def test_every_file_with_nodes_has_a_line_that_imports_it():
    folder = Path(featherweight.nodes.__file__).parent
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("[a-z]*.py")
        if re.search(r"^class .*\bComfyNode\)|^NODE_CONFIG = ", path.read_text(
            encoding="utf-8"), re.M)
    }
    assert len(files) > 15 and files <= set(featherweight.nodes.file_names())
    for name in files:
        assert featherweight.nodes.import_file(name) is sys.modules[f"featherweight.nodes.{name}"]


def test_a_node_keeps_what_it_says_itself_about_running_again():
    module = types.ModuleType("of_somebody")

    class Plain(io.ComfyNode):
        __module__ = module.__name__

        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Plain", inputs=[], outputs=[])

        @classmethod
        def execute(cls):
            return io.NodeOutput()

    class WithItsOwn(Plain):
        __module__ = module.__name__

        @classmethod
        def fingerprint_inputs(cls, **inputs):
            return "its own"

    module.Plain, module.WithItsOwn = Plain, WithItsOwn
    assert featherweight.nodes.find_nodes(module) == [Plain, WithItsOwn]
    assert Plain.fingerprint_inputs() == 0 and WithItsOwn.fingerprint_inputs() == "its own"


@pytest.fixture
def host_folders(tmp_path, monkeypatch):
    """The host's folder table with one directory per kind of model."""
    table = {}
    for key in (*folders.GGUF_FOLDERS.values(), "diffusers", "embeddings"):
        (tmp_path / key).mkdir()
        table[key] = ([str(tmp_path / key)], set(folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return table


def test_gguf_folders_keep_directories_of_a_users_yaml_and_gain_the_hosts(host_folders, tmp_path):
    host_folders["unet_gguf"] = ([str(tmp_path / "mine")], set())
    folders.register_folders()
    assert host_folders["unet_gguf"] == (
        [str(tmp_path / "mine"), str(tmp_path / "diffusion_models")],
        {".gguf"},
    )
    assert host_folders["clip_gguf"] == ([str(tmp_path / "text_encoders")], {".gguf"})


def test_gguf_folders_do_not_write_into_lists_another_pack_shares(host_folders, tmp_path):
    shared = host_folders["diffusion_models"][0]
    host_folders["unet_gguf"] = (shared, {".gguf"})  # what ComfyUI-GGUF does
    folders.register_folders()
    folders.register_folders()
    assert shared == [str(tmp_path / "diffusion_models")]
    assert host_folders["unet_gguf"] == (shared, {".gguf"})
    assert ".gguf" not in host_folders["diffusion_models"][1]


def test_files_are_listed_gguf_first_and_found_under_another_systems_separator(
        host_folders, tmp_path):
    folders.register_folders()
    for name in ("b.safetensors", "flux/a.gguf"):
        path = tmp_path / "diffusion_models" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert folders.list_files("unet_gguf", "diffusion_models") == [
        os.path.join("flux", "a.gguf"), "b.safetensors"]
    expected = str(tmp_path / "diffusion_models" / "flux" / "a.gguf")
    assert (
        folders.find_file("flux\\a.gguf", "unet_gguf")
        == expected
        == folders.find_file("flux/a.gguf", "unet_gguf")
    )
    with pytest.raises(WeightFileError, match="gone.gguf is in none of the model folders"):
        folders.find_file("gone.gguf", "unet_gguf")


def test_folders_of_diffusers_are_listed_and_found(host_folders, tmp_path):
    def folder(key, name, config):
        (tmp_path / key / name).mkdir(parents=True)
        (tmp_path / key / name / "config.json").write_text(config)
        (tmp_path / key / name / "weights.safetensors").touch()

    for key in ("diffusion_models", "diffusers"):
        folder(key, "package/transformer", '{"_class_name": "FluxTransformer2DModel"}')
        folder(key, "package/vae", '{"_class_name": "AutoencoderKL"}')
        folder(key, "package/text_encoder_2", '{"architectures": ["T5EncoderModel"]}')
    folder("diffusion_models", "broken", "[not JSON")
    assert folders.list_model_folders("diffusion_models") == [
        os.path.join("package", "transformer")]
    assert folders.list_pipeline_folders("checkpoints", "diffusers") == ["package"]
    expected = str(tmp_path / "diffusion_models" / "package" / "transformer")
    assert folders.find_file("package\\transformer", "diffusion_models") == expected
    for outside in ("..", "../diffusers/package"):
        with pytest.raises(WeightFileError, match="in none of the model folders"):
            folders.find_file(outside, "diffusion_models")
    for nothing in ("", None):
        with pytest.raises(WeightFileError, match="No file is picked. Pick one"):
            folders.find_file(nothing, "diffusion_models")


def test_what_another_pack_adds_to_a_folder_later_is_listed(host_folders, tmp_path):
    folders.register_folders()
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "late.gguf").touch()
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path / "late"))
    assert folders.list_files("unet_gguf") == ["late.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_a_node_refused_is_not_mapped_any_more(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(bytes(100))

    def read():
        mapped = map_file(path)
        try:
            raise KeyError(mapped[0])
        except KeyError as error:
            raise ValueError("damaged") from error

    with pytest.raises(ValueError, match="damaged") as kept:
        release_files_on_error(read)()
    assert kept.value.__cause__ is not None and not windows_rules.is_busy(path)
