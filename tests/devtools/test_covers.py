"""The covers of the example workflows: the code draws each, and what they say is true."""
import functools

import numpy as np
import pytest
from PIL import Image

from devtools.files import demo_files
from devtools.workflows import DEMO, FIRST, FOLDER, covers, example_paths
from devtools.workflows.workflow import Workflow

SHOWN = 256  # pixels, the height at which the template browser shows a cover
MADE = {path.stem: Workflow(path) for path in example_paths()}
COVERS = {name: covers.describe(workflow) for name, workflow in MADE.items()}
each = pytest.mark.parametrize("name", MADE)


def path_of(name: str):
    return FOLDER / f"{name}.jpg"


def test_every_workflow_has_a_cover_and_no_cover_is_without_a_workflow():
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(MADE)


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
        "run `python -m devtools.workflows --cover FILE`")
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
        assert line.isascii(), "the font has no other letters"
        assert left >= 20 and right <= covers.PIXELS - 20, line
        assert size >= 14, line


@each
def test_a_model_with_one_file_has_its_size_on_the_cover(name):
    """Where the note's tree gives the size of the file, and the weights stay as they are."""
    cover, workflow = COVERS[name], MADE[name]
    loaders = workflow.types(*covers.LOADERS)
    file = f"diffusion_models/{loaders[0]['widgets_values'][0]}"
    size = workflow.files.get(file)
    if size and cover.weights[1].startswith("fits"):
        assert cover.weights[0] == size


@each
def test_a_cover_says_the_figure_of_the_demos_file(name, tmp_path):
    cover = COVERS[name]
    if not name.startswith(DEMO) or cover.weights is None or "packed" in name:
        assert cover.weights or "side by side" in name
        return
    model = cover.format.removeprefix("GGUF ")
    if model not in demo_files.recipes():
        pytest.skip(f"{model} files cannot be written here")
    path = tmp_path / demo_files.MODELS[model]
    demo_files.write_model(path, model)
    assert cover.weights == (f"{path.stat().st_size / 1e6:.1f} MB", "of weights")


@pytest.mark.parametrize(("name", "model", "about", "form", "weights"), [
    ("Flux.1 dev 4-bit package on 8 GB", "Flux.1 dev", "4-bit package on 8 GB", "NF4",
     ("6.7 GB", "fits 10 GB cards")),
    ("Flux.1 dev GGUF with a budget on 8 GB", "Flux.1 dev", "with a budget on 8 GB", "GGUF Q8_0",
     ("5.0 GB", "on the card")),
    ("Flux.1 dev two LoRAs into a GGUF", "Flux.1 dev", "two LoRAs into a GGUF", "GGUF Q4_K",
     ("24 GB", "of main memory")),
    ("Flux.1 dev packed while it loads", "Flux.1 dev", "packed while it loads", "packed to Q4_K",
     ("6.8 GB", "of weights")),
    ("Flux.1 dev GGUF packed to int8", "Flux.1 dev", "packed to int8", "packed to int8_convrot",
     ("12.0 GB", "of weights")),
    ("Flux.1 dev SVDQuant with a LoRA", "Flux.1 dev", "with a LoRA", "SVDQuant int4",
     ("6.8 GB", "of weights")),
    ("Qwen-Image SDNQ", "Qwen-Image", "", "SDNQ uint4", ("12 GB", "fits 16 GB cards")),
    ("SD3.5 Large Turbo GGUF", "SD3.5 Large Turbo", "", "GGUF Q4_0",
     ("4.8 GB", "fits 8 GB cards")),
    ("Wan 2.1 14B VACE module", "Wan 2.1 14B", "VACE module", "GGUF Q4_K_M + fp8",
     ("13.2 GB", "of weights")),
    (f"{DEMO} packed to a size", DEMO, "packed to a size", "GGUF mix", ("5 MB", "in the file")),
    (f"{DEMO} side by side", DEMO, "side by side", "6 packings", None),
])
def test_a_cover_says_model_format_and_memory(name, model, about, form, weights):
    cover = COVERS[name]
    assert (cover.model, cover.about, cover.format, cover.weights) == (model, about, form, weights)


def test_the_first_says_so():
    name = next(iter(MADE))
    assert name.startswith(FIRST) and COVERS[name].about.startswith(f"{FIRST}: ")
    assert COVERS[name].model == "Z-Image Turbo"


def test_a_model_without_a_colour_is_named_up_to_its_format(tmp_path):
    path = tmp_path / "Chroma GGUF with a LoRA.json"
    path.write_text((FOLDER / "Flux.1 dev GGUF with GGUF T5.json").read_text(encoding="utf-8"),
                    encoding="utf-8")
    cover = covers.describe(Workflow(path))
    assert (cover.model, cover.about, cover.colour) == ("Chroma", "with a LoRA", covers.OTHERS)


@pytest.mark.parametrize(("name", "inputs", "outputs"), [
    (DEMO, ("text",), ("picture",)),
    (f"{DEMO} on Ray", ("text", "LoRA"), ("pictures",)),
    ("Flux.1 dev NF4 with two LoRAs", ("text", "2 LoRAs"), ("picture",)),
    ("Flux.1 dev two LoRAs into a GGUF", ("2 LoRAs",), ("file",)),
    ("Flux 2 Klein GGUF with a LoRA check", ("text", "picture", "LoRA"), ("picture",)),
    ("Flux.1 dev GGUF with ControlNet", ("text", "picture"), ("picture",)),
    ("Wan 2.2 14B GGUF video in 4 steps", ("text", "2 LoRAs"), ("video",)),
    ("LTX-2 GGUF video with sound", ("text",), ("video", "sound")),
])
def test_pictograms_are_what_goes_in_and_comes_out(name, inputs, outputs):
    assert (COVERS[name].inputs, COVERS[name].outputs) == (inputs, outputs)


def test_pictures_are_those_of_the_demo_that_a_workflow_draws():
    assert {name: cover.pictures for name, cover in COVERS.items() if cover.pictures} == {
        DEMO: ("Q8_0",), f"{DEMO} side by side": covers.SHEET_TITLES}
