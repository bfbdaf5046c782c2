"""Files as their publishers write them load, an inspection names them, and neither says a word that
is not right."""
import logging
import random
import re

import numpy as np
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from host_formats import ASYMMETRIC
from pack_api import AUTOMATIC, EXACT, FAST, QuantizedTensor, is_packed, load_notes, product
from published_files import ROWS, Row, model_of
from published_models import patchers

from featherweight.loaders.comfyui.contents import file_contents
from featherweight.loaders.inspect.identify import identify

pytestmark = pytest.mark.usefixtures("small_models")

COMPARED = 12  # weights of a file


def check_row(row: Row, model_name: str, form: str, computes, chance: random.Random, folder,
              monkeypatch, caplog):
    """computes: choices of the input `compute`."""
    model = model_of(model_name)
    with model.small(monkeypatch):
        path, values = row.forms[form](folder, model.weights(), chance)
        for compute in computes:
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                loaded = model.load(str(path), compute)
            told = {note for patcher in patchers(loaded) for note in load_notes(patcher)}
            told |= {record.getMessage() for record in caplog.records
                     if record.name.startswith("featherweight")}
            assert not not_right(row, told)
            weights = model.parameters(loaded)
            assert values.keys() <= weights.keys()
            for name in chance.sample(sorted(values), min(COMPARED, len(values))):
                assert_equal(name, weights[name], values[name])
            host_name = model.host_name(loaded)
            inspection = identify(file_contents(str(path)))
            assert not inspection.problem
            assert not not_right(row, inspection.warnings)
            assert (inspection.model_type, inspection.host) == (row.inspected or model.role,
                                                                host_name)


def not_right(row: Row, texts) -> list[str]:
    """Returns those of what is told of a file that the row does not have."""
    return [text for text in texts if not any(re.search(each, text) for each in row.notes)]


def assert_equal(name: str, weight: torch.Tensor, expected):
    if is_packed(weight):
        weight = product.dequantize(weight, torch.float32)
    elif isinstance(weight, QuantizedTensor):
        return  # of a layer of the host's
    expected = torch.as_tensor(np.array(expected)).float()
    expected = expected.view(weight.shape if expected.ndim < weight.ndim else expected.shape)
    weight = weight.detach().float()
    assert weight.shape == expected.shape, name
    assert (weight - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_a_published_file_loads_without_a_word_and_an_inspection_names_it(row, tmp_path,
                                                                          monkeypatch, caplog):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    check_row(row, chance.choice(row.models), chance.choice(sorted(row.forms)),
              [chance.choice((EXACT, AUTOMATIC))], chance, tmp_path, monkeypatch, caplog)


@pytest.mark.heavy
@pytest.mark.parametrize(("row", "model_name", "form"), [
    pytest.param(row, model_name, form, id=f"{row.title}: {model_name}, {form}")
    for row in ROWS for model_name in row.models for form in row.forms])
def test_every_form_of_a_published_file_loads_so(row, model_name, form, tmp_path, monkeypatch,
                                                 caplog):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    computes = (EXACT, AUTOMATIC)
    if form != "w4a8" or ASYMMETRIC in QUANT_ALGOS:  # which the host computes where it has it
        computes = (*computes, FAST)
    check_row(row, model_name, form, computes, random.Random(seed), tmp_path, monkeypatch, caplog)
