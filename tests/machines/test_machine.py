"""What a machine says of a workflow's choices: asked of ComfyUI's own inputs and folders, and of this pack's as they judge."""
import folder_paths
import nodes
import pytest
from featherweight.loaders.folders import register_folders
from featherweight.machines.machine import choices, folders, memory, packs
from featherweight.nodes.load_diffusion_model import LoadDiffusionModel

OURS, MODEL = "FeatherweightLoadDiffusionModel", "model_name"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of models with a GGUF, one in two parts, a folder of diffusers and a LoRA; our loader is there."""
    folder = tmp_path / "diffusion_models"
    for name in ("flux/model.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf",
                 "pipe/config.json", "pipe/weights.safetensors", "pipe/old.safetensors.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0123456789")
    (folder / "pipe" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}', encoding="utf-8")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ink.safetensors").write_bytes(b"01234")
    (tmp_path / "secret.gguf").write_bytes(b"0")
    registered = folder_paths.folder_names_and_paths
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {
        **{key: ([], kinds) for key, (_, kinds) in registered.items()},
        "diffusion_models": ([str(folder)], registered["diffusion_models"][1]),
        "loras": ([str(tmp_path / "loras")], registered["loras"][1])})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for key in ("unet_gguf", "loras_gguf"):
        folder_paths.folder_names_and_paths.pop(key, None)
    register_folders()
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, OURS, LoadDiffusionModel)
    return folder


def answer(*question):
    return choices([question])[question]


@pytest.mark.parametrize("name, files", [
    ("flux/model.gguf", ["flux/model.gguf"]),
    ("flux\\model.gguf", ["flux/model.gguf"]),
    ("m-00001-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
    ("pipe", ["pipe/config.json", "pipe/weights.safetensors"]),
])
def test_a_choice_stands_for_its_files_all_parts_of_a_model_and_all_of_a_folder(models, name, files):
    found = answer(OURS, MODEL, name)
    assert found["taken"] and [file for _, _, file, _ in found["files"]] == files
    assert {(folder, size) for _, folder, file, size in found["files"] if file != "pipe/config.json"} == {(str(models), 10)}


@pytest.mark.parametrize("name", ["no_such.gguf", "../secret.gguf", "flux/../../secret.gguf", "..\\secret.gguf"])
def test_a_file_that_is_not_there_is_told_of_our_loaders_which_judge_by_themselves(models, name):
    assert "is in none of the model folders" in LoadDiffusionModel.validate_inputs(name)
    assert answer(OURS, MODEL, name) == {"taken": False, "files": []}


def test_the_hosts_loaders_take_what_they_list_and_nothing_else(models):
    lora = ("LoraLoaderModelOnly", "lora_name")
    assert answer(*lora, "ink.safetensors") == {"taken": True, "files": [("loras", str(models.parent / "loras"),
                                                                        "ink.safetensors", 5)]}
    assert answer(*lora, "other.safetensors") == {"taken": False, "files": []}
    assert answer("KSampler", "sampler_name", "euler") == {"taken": True, "files": []}
    assert answer("KSampler", "sampler_name", "no_such") == {"taken": False, "files": []}


def test_texts_and_numbers_and_classes_that_are_not_there_are_no_choices(models):
    assert choices([("CLIPTextEncode", "text", "a.gguf"), ("NoSuchNode", "name", "a.gguf"), (OURS, "no_such", "a.gguf")]) == {}


def test_an_input_picture_is_a_file_of_the_input_folder(models, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "cat.png").write_bytes(b"012")
    assert answer("LoadImage", "image", "cat.png") == {"taken": True,
                                                       "files": [("input", str(tmp_path / "input"), "cat.png", 3)]}
    assert not answer("LoadImage", "image", "dog.png")["taken"]
    assert folders()["input"] == [str(tmp_path / "input")] and "custom_nodes" not in folders()


def test_a_class_comes_from_a_pack_or_from_comfyui(monkeypatch):
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "LittleNode", type("Little", (), {
        "RELATIVE_PYTHON_MODULE": "custom_nodes.little.pack"}))
    assert packs(["KSampler", "LittleNode", "NoSuchNode"]) == {"KSampler": "ComfyUI", "LittleNode": "little.pack"}


def test_without_a_gpu_none_is_told():
    found = memory()
    assert found["gpus"] == [] and 0 < found["free"] < found["all"]
