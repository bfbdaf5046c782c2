"""Each diffusion model of the list in docs/compatibility.md, in each form of file."""
from pathlib import Path

import pytest
from diffusion_tester import MODEL_FORMS, DiffusionTester
from model_table import list_of

pytestmark = pytest.mark.usefixtures("small_models")

COMPATIBILITY = Path(__file__).parents[3] / "docs" / "compatibility.md"


class TestModels(DiffusionTester):
    formats = MODEL_FORMS
    some_formats = tuple(MODEL_FORMS)


def test_the_list_of_models_in_the_docs_is_that_of_these_tests():
    assert list_of() in " ".join(COMPATIBILITY.read_text(encoding="utf-8").split())
