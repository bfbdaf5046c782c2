"""The covers of the example workflows: the code draws each, and what they say is true."""
import functools
import re

import numpy as np
import pytest
from PIL import Image

from devtools import ROOT
from devtools.files import demo_files
from devtools.workflows import FOLDER, WORKFLOWS, covers
from devtools.workflows.editor import Workflow
from devtools.workflows.flux import BITS

SHOWN = 256  # pixels, the height at which the template browser shows a cover
MADE = {workflow.name: workflow for workflow in (make() for make in WORKFLOWS)}
COVERS = {name: covers.describe(workflow) for name, workflow in MADE.items()}
each = pytest.mark.parametrize("name", MADE)


def path_of(name: str):
    return FOLDER / f"{name}.jpg"


def test_every_workflow_has_a_cover_and_no_cover_is_without_a_workflow():
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(MADE)
    named = {*covers.WEIGHTS, *covers.FORMATS, *covers.PICTURES}
    assert named <= set(MADE)


def reduced(picture: Image.Image) -> np.ndarray:
    """Means of 4 x 4 pixels, which a JPEG keeps."""
    return np.asarray(picture.convert("RGB").reduce(4), np.float32)


@functools.cache
def drawn(name: str) -> np.ndarray:
    return reduced(covers.draw(COVERS[name]))


@each
def test_the_cover_is_the_one_that_the_code_draws(name):
    """Up to what a JPEG loses, and other versions of the library that draws letters."""
    with Image.open(path_of(name)) as cover:
        assert cover.format == "JPEG" and cover.size == (covers.PIXELS, covers.PIXELS)
        pixels = reduced(cover)
    differences = {other: np.abs(pixels - drawn(other)).mean() for other in COVERS}
    assert min(differences, key=differences.get) == name and differences[name] < 1.5, (
        "run `python -m devtools.workflows.covers`")
    assert path_of(name).stat().st_size < 60_000


def test_families_differ_by_their_colours():
    assert len(set(covers.FAMILIES.values())) >= 8


@each
def test_all_text_is_inside_and_legible_where_it_is_shown(name, monkeypatch):
    written, text = [], covers.Pen.text

    def record(pen, left, middle, line, size, *args, **kwargs):
        written.append((line, left, left + pen.width(line, size), size * SHOWN / covers.PIXELS))
        text(pen, left, middle, line, size, *args, **kwargs)

    monkeypatch.setattr(covers.Pen, "text", record)
    covers.draw(COVERS[name])
    assert {COVERS[name].model, COVERS[name].format} <= {line for line, *_ in written}
    for line, left, right, size in written:
        assert left >= 20 and right <= covers.PIXELS - 20, line
        assert size >= 14, line


def stated(figure: str, workflow: Workflow) -> bool:
    """Whether the workflow's note has the figure: "12.7 GB", or "5 GB" for "5.0 GB"."""
    forms = {figure, figure.replace(".0 ", " ")}
    return any(re.search(rf"(?<![\d.]){re.escape(form)}\b", workflow.note) for form in forms)


@each
def test_what_the_weights_take_is_what_the_note_or_the_file_says(name, tmp_path):
    cover = COVERS[name]
    if cover.weights is None:
        return
    figure, _ = cover.weights
    if not name.startswith("Featherweight demo") or "packed" in name:
        assert stated(figure, MADE[name])
        return
    model = cover.format.removeprefix("GGUF ")
    if model not in demo_files.recipes():
        pytest.skip(f"{model} files cannot be written here")
    path = tmp_path / demo_files.MODELS[model]
    demo_files.write_model(path, model)
    assert figure == f"{path.stat().st_size / 1e6:.1f} MB"


def test_a_figure_that_is_not_in_the_note_is_noticed():
    """What the test above relies on."""
    workflow = MADE["Qwen-Image GGUF"]
    assert stated("13.1 GB", workflow) and not stated("3.1 GB", workflow)
    assert not stated("12.9 GB", workflow)


def test_the_notes_of_flux_have_the_sizes_of_the_docs():
    head, row = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(("| GB ", "| Flux.1 dev, schnell, Kontext | 11.9")))
    sizes = dict(zip(head, row))
    assert {type_name: size for size, type_name in re.findall(r"([\d.]+) GB as (\w+)", BITS)} == {
        name: sizes[name] for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K")}


@each
def test_the_type_is_in_a_name_or_a_choice_of_the_workflow(name):
    values = [str(value) for node in MADE[name].nodes for value in node.inputs.values()]
    type_name = COVERS[name].format.split()[-1].lower()
    assert name in covers.FORMATS or any(type_name in value.lower() for value in values)


@pytest.mark.parametrize(("name", "inputs", "outputs"), [
    ("Featherweight demo", ("text",), ("picture",)),
    ("Featherweight demo on Ray", ("text", "LoRA"), ("pictures",)),
    ("Flux.1 dev NF4 with two LoRAs", ("text", "2 LoRAs"), ("picture",)),
    ("Flux.1 dev two LoRAs into a GGUF", ("2 LoRAs",), ("file",)),
    ("Flux 2 Klein GGUF with a LoRA check", ("text", "picture", "LoRA"), ("picture",)),
    ("Flux.1 dev GGUF with ControlNet", ("text", "picture"), ("picture",)),
    ("Wan 2.2 14B GGUF video in 4 steps", ("text", "2 LoRAs"), ("video",)),
    ("LTX-2 GGUF video with sound", ("text",), ("video", "sound")),
])
def test_pictograms_are_what_goes_in_and_comes_out(name, inputs, outputs):
    assert (COVERS[name].inputs, COVERS[name].outputs) == (inputs, outputs)


def test_pictures_are_those_of_the_demo_alone():
    assert covers.PICTURES
    assert all(name.startswith("Featherweight demo") for name in covers.PICTURES)
