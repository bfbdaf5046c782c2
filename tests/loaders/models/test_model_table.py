"""The models of docs/compatibility.md in each form of file: what loads computes as the host's dense
model of the same values, LoRAs are exact, and an inspection names the model."""
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_weights, shrunken_detection
from model_table import FORMS, MODELS, NEWEST, assert_computes_as_dense, list_of
from safetensors.torch import load, save_file

from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.inspect.inspection import identify

pytestmark = pytest.mark.usefixtures("small_models")

COMPATIBILITY = Path(__file__).parents[3] / "docs" / "compatibility.md"
CASES = [
    pytest.param(title, form, marks=() if title in NEWEST else pytest.mark.heavy)
    for title in MODELS for form in FORMS
]


def put_metadata(path, metadata):
    save_file(load(Path(path).read_bytes()), path, metadata)


@pytest.mark.parametrize(("title", "form"), CASES)
def test_a_model_in_each_form_computes_as_its_dense_values_with_a_lora(title, form, tmp_path,
                                                                       monkeypatch):
    family = FAMILIES[MODELS[title]]
    shrunken_detection(family, monkeypatch)
    write, file_name = FORMS[form]
    path = tmp_path / file_name
    options = {"metadata": family.metadata} if form == "GGUF" else {}
    values = {name: torch.as_tensor(value).float()
              for name, value in write(path, random_weights(family), **options).items()}
    if family.metadata and not options:
        put_metadata(next(path.glob("*.safetensors"), path), family.metadata)
    dense = assert_computes_as_dense(str(path), values, family, least=3)
    inspection = identify(file_contents(str(path)))
    assert inspection.host == type(dense.model.model_config).__name__ and not inspection.problem


def test_the_list_of_models_in_the_docs_is_that_of_these_tests():
    assert list_of() in " ".join(COMPATIBILITY.read_text(encoding="utf-8").split())
