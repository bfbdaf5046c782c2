"""Inspect Model File, the node and the command: every folder is listed, what is picked is told,
nothing is a traceback."""
import os

import pytest
import torch
from model_folders import use_empty_folders
from pack_api import WeightFileError, load_diffusion_model
from safetensors.torch import save_file

from devtools import inspect_file
from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf
from featherweight.nodes.inspect_model_file import NONE, InspectModelFile, list_all_files

SIZES = {"hidden": 128, "double_blocks": 1, "single_blocks": 1}


@pytest.fixture
def model_folders(tmp_path, monkeypatch):
    """One folder for each kind of model, with a file in it."""
    use_empty_folders(tmp_path, monkeypatch)
    save_file({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)},
              tmp_path / "vae" / "vae.safetensors")
    (tmp_path / "diffusion_models" / "flux").mkdir()
    types = {"flux/packed.gguf": "Q8_0", "flux/dense.gguf": "F16"}
    for name, packed in types.items():
        write_gguf(tmp_path / "diffusion_models" / name, tiny_models.flux(**SIZES),
                   lambda name, values: packed if values.ndim > 1 else "F32")
    (tmp_path / "text_encoders" / "broken.gguf").write_bytes(b"GGUF")
    return tmp_path


def test_files_of_every_folder_are_listed(model_folders):
    assert set(list_all_files()) == {
        "vae.safetensors",
        os.path.join("flux", "packed.gguf"),
        os.path.join("flux", "dense.gguf"),
        "broken.gguf",
    }
    file = InspectModelFile.define_schema().inputs[0]
    assert file.options[0] == NONE and len(file.options) == len(set(file.options)) == 5


def test_folders_of_models_and_of_text_encoders_are_listed(model_folders):
    for name, said in (("diffusion_models/package/transformer",
                        '"_class_name": "FluxTransformer2DModel"'),
                       ("text_encoders/t5", '"architectures": ["T5EncoderModel"]')):
        (model_folders / name).mkdir(parents=True)
        (model_folders / name / "config.json").write_text(f"{{{said}}}")
        save_file({"shared.weight": torch.zeros(8, 8)}, model_folders / name / "model.safetensors")
    inside = os.path.join("package", "transformer")
    assert {"package", inside, "t5"} <= set(list_all_files())
    assert InspectModelFile.execute("t5").args[0].startswith("t5 is a text encoder")


def test_a_file_is_told_as_text_and_picture_and_shown_on_the_node(model_folders):
    output = InspectModelFile.execute("flux\\packed.gguf", reference_name="flux/dense.gguf")
    text, picture = output.args
    assert (
        text.startswith("packed.gguf is a diffusion model: Flux.1.")
        and "loss against dense.gguf" in text
    )
    assert picture.shape[::3] == (1, 3) and picture.min() >= 0 and picture.max() <= 1
    assert output.ui["text"] == (text,) and len(output.ui["images"]) == 1


def test_a_model_takes_the_place_of_the_file(model_folders):
    model = load_diffusion_model(str(model_folders / "diffusion_models/flux/packed.gguf"))
    assert InspectModelFile.execute("vae.safetensors",
                                    model).args[0].startswith("packed.gguf is a diffusion model")
    assert InspectModelFile.execute("vae.safetensors").args[0].startswith(
        "vae.safetensors is a VAE")


def test_a_saved_path_takes_the_place_of_the_file_and_no_other_folder_is_read(
        model_folders, tmp_path_factory):
    saved = model_folders / "diffusion_models" / "flux" / "packed.gguf"
    assert InspectModelFile.execute(
        "vae.safetensors", path=str(saved)).args[0].startswith("packed.gguf is a diffusion model")
    outside = tmp_path_factory.mktemp("outside") / "packed.gguf"
    outside.write_bytes(saved.read_bytes())
    around = model_folders / "vae" / ".." / ".." / outside.parent.name / outside.name
    for path in (outside, around, model_folders / "vae" / "gone"):
        with pytest.raises(WeightFileError,
                           match="is not a model in ComfyUI's output or model folders"):
            InspectModelFile.execute(NONE, path=str(path))


def test_a_damaged_file_is_a_report_not_an_error(model_folders):
    text, picture = InspectModelFile.execute("broken.gguf").args
    assert text.startswith("broken.gguf: the file ends") and picture.shape[2] == 960


def test_nothing_picked_and_a_missing_file_are_one_sentence(model_folders):
    with pytest.raises(ValueError, match="has nothing to inspect: pick a file, or connect a model"):
        InspectModelFile.execute(NONE)
    with pytest.raises(WeightFileError, match="gone.gguf is in none of the model folders"):
        InspectModelFile.execute("gone.gguf")


def test_the_command_prints_the_report_and_writes_the_picture(model_folders, capsys):
    flux = model_folders / "diffusion_models" / "flux"
    options = ["--reference", str(flux / "dense.gguf"), "--picture", str(model_folders / "out.png")]
    assert inspect_file.main([str(flux / "packed.gguf"), *options]) == 0
    assert "needs VAE: Flux" in capsys.readouterr().out
    assert (model_folders / "out.png").read_bytes().startswith(b"\x89PNG")
    assert inspect_file.main([str(model_folders / "text_encoders" / "broken.gguf")]) == 1
