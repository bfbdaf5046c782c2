"""Model files that have become others of their names."""
import folder_paths
import pytest

from featherweight.loaders.file_versions import FileVersions


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
    ("m-00002-of-00002.safetensors", "config.json"),
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
