"""SeedVR2 in files that lack the two texts that it runs with."""
import folder_paths
import pytest
import torch
from families import (
    FAMILIES,
    comfyui_gguf_style,
    host_patcher,
    random_weights,
    relative_error,
    run,
    shrunken_detection,
)
from pack_api import WeightFileError, load_diffusion_model
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.lora.seedvr2 import FILES

FAMILY = FAMILIES["seedvr2-3b"]
LACKS = ("^model.gguf lacks 'negative_conditioning' and 'positive_conditioning', which ComfyUI"
         " expects in a file of SeedVR2. Put SeedVR2's pos_emb.pt and neg_emb.pt next to it, or get"
         " a conversion of a file that was made for ComfyUI.$")


class Program:
    """Leaves a file where a pickle of it is loaded as such."""

    def __reduce__(self):
        return open, ("program_was_run", "w")


pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def texts():
    """Their names in the model -> values."""
    return {name: random_weights(FAMILY)[name] for name in FILES}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """(path, values) of a model without its texts, in a folder that is no model folder."""
    shrunken_detection(FAMILY, monkeypatch)
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {
        key: ([str(models)], {".safetensors"}) for key in ("diffusion_models", "text_encoders")})
    path = tmp_path / "elsewhere" / "model.gguf"
    path.parent.mkdir()
    weights = {name: value for name, value in random_weights(FAMILY).items() if name not in FILES}
    return path, write_gguf(path, weights, **comfyui_gguf_style())


def save_pt(value, path):
    torch.save(value, path.with_suffix(".pt"))


@pytest.mark.parametrize(("folder", "save"), [
    ("elsewhere", save_pt), ("models", lambda text, path: save_pt([text[None]], path)),
    ("models", lambda text, path: save_file({"text": text}, path.with_suffix(".safetensors")))])
def test_its_texts_are_read_from_their_own_files(folder, save, model, texts, tmp_path):
    path, values = model
    for name, value in texts.items():
        save(value, tmp_path / folder / FILES[name])
    values = dict(values)
    expected = run(host_patcher(values | texts, FAMILY), FAMILY)
    ours = load_diffusion_model(str(path))
    assert relative_error(run(ours, FAMILY), expected) < 1e-5
    other = host_patcher(values | {name: value.flip(1) for name, value in texts.items()},
                         FAMILY)
    assert relative_error(run(other, FAMILY), expected) > 1e-4  # the texts count


def test_without_them_it_is_refused_in_a_sentence_that_says_what_to_do(model):
    with pytest.raises(WeightFileError, match=LACKS):
        load_diffusion_model(str(model[0]))


@pytest.mark.parametrize(("content", "text"), [
    (torch.ones(58, 512), "^pos_emb.pt does not hold a text of SeedVR2, expected one tensor of"
     " tokens by 5120. Replace it by the file that was published with SeedVR2.$"),
    (torch.ones(5120), "^pos_emb.pt does not hold a text"), ({}, "^pos_emb.pt does not hold"),
    (torch.ones(2, 58, 5120), "^pos_emb.pt does not hold a text"),
    (torch.ones(58, 5120, dtype=torch.int8), "^pos_emb.pt does not hold a text"),
    (Program(), "^pos_emb.pt cannot be read as a text of SeedVR2: it is damaged, or holds"
     " more than tensors, which could be a program and is not run.")])
def test_a_file_that_holds_something_else_is_refused_and_runs_nothing(content, text, model,
                                                                      monkeypatch):
    monkeypatch.chdir(model[0].parent)
    torch.save(content, model[0].parent / "pos_emb.pt")
    with pytest.raises(WeightFileError, match=text):
        load_diffusion_model(str(model[0]))
    assert not (model[0].parent / "program_was_run").exists()
