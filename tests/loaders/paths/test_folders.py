"""Names of model files: what is offered, what a name finds, and files that have become others of
their names."""
import random
import unicodedata
from pathlib import Path

import folder_paths
import pytest

from featherweight.loaders.paths.file_versions import FileVersions
from featherweight.loaders.paths.folders import (
    find_file,
    list_files,
    new_sensitivity_path,
    sensitivities_of,
    validate_files,
)


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models",
                        ([str(tmp_path)], {".gguf", ".safetensors"}))
    return tmp_path


def test_a_replaced_file_is_counted_and_an_untouched_one_is_not(models):
    (models / "a.gguf").write_bytes(b"1")
    (models / "b.gguf").write_bytes(b"1")
    replacements = FileVersions()
    assert [replacements.update(["a.gguf", 5, None, "a text"]) for _ in range(2)] == [0, 0]
    assert replacements.update(["a.gguf", "b.gguf"]) == 0
    (models / "new").write_bytes(b"1")
    (models / "new").replace(models / "b.gguf")  # of the same size and content
    assert [
        replacements.update(names) for names in (["a.gguf"], ["b.gguf"], ["b.gguf", "a.gguf"])
    ] == [0, 1, 1]
    (models / "b.gguf").unlink()
    (models / "b.gguf").write_bytes(b"12")
    assert replacements.update(["b.gguf"]) == 2


def test_a_file_added_to_a_folder_counts(models):
    folder = models / "package"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "one.safetensors").write_bytes(b"1")
    replacements = FileVersions()
    assert replacements.update(["package"]) == 0
    (folder / "two.safetensors").write_bytes(b"1")
    assert replacements.update(["package"]) == 1


@pytest.mark.parametrize(("picked", "beside"), [
    ("Encoder-Q4_K.gguf", "mmproj-Encoder-F16.gguf"), ("Encoder-Q4_K.gguf", "Encoder.MMPROJ.gguf"),
    ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf"),
    ("model-00001-of-00002.gguf", "mmproj-model-F16.gguf"),
    ("m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors"),
    ("sdnq.safetensors", "config.json"), ("sdnq.safetensors", "quantization_config.json"),
    ("m-00002-of-00002.safetensors", "config.json"), ("lora.safetensors", "adapter_config.json"),
    ("fp8.safetensors", "fp8_map.pt"),
])
def test_what_is_read_beside_a_file_counts_and_no_other_does(picked, beside, models):
    (models / picked).write_bytes(b"1")
    replacements = FileVersions()
    (models / "another-00002-of-00002.gguf").write_bytes(b"1")
    assert replacements.update([picked]) == 0
    (models / "a new one.gguf").write_bytes(b"1")
    (models / "another-00002-of-00002.gguf").write_bytes(b"12")
    assert replacements.update([picked]) == 0
    (models / beside).write_bytes(b"1")
    assert replacements.update([picked]) == 1
    (models / beside).write_bytes(b"12")
    assert replacements.update([picked]) == 2


def test_another_file_of_the_name_counts_in_whatever_folder_it_is(models, tmp_path_factory,
                                                                  monkeypatch):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "unet_gguf", ([str(other)], {".gguf"}))
    (models / "a.gguf").write_bytes(b"1")
    replacements = FileVersions()
    assert replacements.update(["a.gguf"]) == 0
    (models / "a.gguf").unlink()
    (other / "a.gguf").write_bytes(b"1")
    assert [replacements.update(["a.gguf"]) for _ in range(2)] == [1, 1]
    (models / "a.gguf").write_bytes(b"1")  # which may come first now
    assert replacements.update(["a.gguf"]) == 2


def test_a_measurement_of_a_model_counts_for_nodes_that_read_it(models, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(models / "output"))
    (models / "flux.gguf").write_bytes(b"1")
    replacements = FileVersions()

    def counts() -> list[int]:
        return [replacements.update(["flux.gguf"], measured) for measured in (False, True)]

    assert counts() == [0, 0]
    for number in (1, 2):
        path = Path(new_sensitivity_path("flux"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
        assert counts() == [0, number]


def test_a_part_of_a_package_counts(models, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers",
                        ([str(models / "packages")], {"folder"}))
    file = models / "packages" / "flux" / "transformer" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    replacements = FileVersions()
    assert replacements.update(["flux"]) == 0
    file.write_bytes(b"12")
    assert replacements.update(["flux"]) == 1


def test_the_tokenizer_beside_the_folder_of_a_text_encoder_counts(models):
    for folder in ("text_encoder_2", "tokenizer_2", "tokenizer"):
        (models / folder).mkdir()
        (models / folder / "spiece.model").write_bytes(b"1")
    replacements = FileVersions()
    assert replacements.update(["text_encoder_2"]) == 0
    (models / "tokenizer" / "spiece.model").write_bytes(b"12")
    assert replacements.update(["text_encoder_2"]) == 0
    (models / "tokenizer_2" / "spiece.model").write_bytes(b"12")
    assert replacements.update(["text_encoder_2"]) == 1


@pytest.mark.parametrize("name", ["flux.sensitivity", "flux.dat", "flux.imatrix.gguf"])
def test_a_measurement_counts(models, name):
    file = models / name
    file.write_bytes(b"1")
    replacements = FileVersions()
    assert [replacements.update([name]) for name in (file.name, str(file))] == [0, 0]
    file.write_bytes(b"12")
    assert [replacements.update([name]) for name in (file.name, str(file))] == [1, 1]


def test_the_number_is_that_of_every_machine(models):
    (models / "a.gguf").write_bytes(b"1")
    first = FileVersions().update(["a.gguf"])
    (models / "a.gguf").write_bytes(b"22")
    assert FileVersions().update(["a.gguf"]) == first == 0


def test_a_link_that_leads_to_no_file_is_not_offered_until_there_is_one(models):
    (models / "there.gguf").touch()
    (models / "link.gguf").symlink_to(models / "elsewhere")
    assert list_files("diffusion_models") == ["there.gguf"]
    (models / "elsewhere").touch()  # a drive that is connected later
    assert list_files("diffusion_models") == ["link.gguf", "there.gguf"]


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_name_with_accents_finds_its_file_in_either_form_of_unicode(
    models, stored, named, separator
):
    """macOS and Linux write the accents of a file's name in different ways."""
    folder = models / unicodedata.normalize(stored, "modèles")
    folder.mkdir()
    path = folder / unicodedata.normalize(stored, "flux größer.gguf")
    path.write_bytes(b"1")
    name = unicodedata.normalize(named, f"modèles{separator}flux größer.gguf")
    assert find_file(name, "diffusion_models") == str(path)
    assert validate_files(name, keys=["diffusion_models"]) is True
    replacements = FileVersions()
    assert replacements.update([name]) == 0
    path.write_bytes(b"12")
    assert replacements.update([name]) == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_load_takes_the_newest_measurement_of_the_models_name_and_of_no_other(
        seed, tmp_path, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = draw.choice(("flux1-dev", "m (copy)", "a.b+c", "Zoë 模型")) + "-Q8_0"
    path = tmp_path / "elsewhere" / f"{model}.gguf"
    assert sensitivities_of(path) == []  # there is no folder yet
    newest = None
    for _ in range(draw.randint(1, 12)):
        newest = Path(new_sensitivity_path(model))
        newest.write_bytes(b"")
    assert newest is not None
    for other in (f"{model}2_00099_", f"x{model}_00099_", f"{model}_0099_", f"{model}_00099_x"):
        newest.with_name(f"{other}.sensitivity").write_bytes(b"")
    newest.with_name(f"{model}_00099_.gguf").write_bytes(b"")
    assert sensitivities_of(path)[0] == str(newest)
