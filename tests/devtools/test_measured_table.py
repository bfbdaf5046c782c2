"""The table of speeds that people have measured, in docs/performance.md."""
import json

from devtools.measure.measured_table import FOLDER, PAGE, measured, row, with_table

import pytest


def test_the_page_has_a_row_for_each_file():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page)
    assert all(" | ".join(row(figures)) in page for figures in measured())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_holds_what_the_node_gives_and_nothing_of_the_person(path):
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures.keys() == {
        "featherweight_speed", "versions", "device", "kitchen", "model", "latent", "rows",
        "difference"}
    assert not any(mark in path.read_text(encoding="utf-8") for mark in ("/home", ":\\", ".gguf"))
