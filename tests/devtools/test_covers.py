"""The covers of the example workflows: the code draws each, and what they say is true."""
import functools
import re
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from devtools.workflows import FIRST, FOLDER, covers, diagrams, example_paths
from devtools.workflows.workflow import Workflow

SHOWN = 238  # pixels of the width at which the template browser shows a cover
# Right and bottom of the browser's badge "Node graph" on a cover of that size, in editor 1.58.1.
BADGE = (108, 34)
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
def drawing(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    """Returns means of a cover's pixels, its corner with the badge, what is cut at its bottom, and
    its texts: the text, left, right and size in pixels where it is shown."""
    written, text = [], covers.Pen.text

    def record(pen, left, middle, line, size, *args, **kwargs):
        written.append((line, left, left + pen.width(line, size), size * SHOWN / covers.PIXELS))
        text(pen, left, middle, line, size, *args, **kwargs)

    with mock.patch.object(covers.Pen, "text", record):
        cover = covers.draw(MADE[name])
    pixels, (right, bottom) = np.asarray(cover, np.int16), covers.BADGE
    return reduced(cover), pixels[:bottom, :right].copy(), pixels[-covers.CUT:].copy(), written


def drawn(name: str) -> np.ndarray:
    return drawing(name)[0]


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


@each
def test_the_corner_of_the_badge_and_the_bottom_that_the_browser_cuts_are_free(name):
    """The template browser lays a badge over the cover; in editor 1.47.12 a name and a description
    of two lines each leave 208 of 218 pixels."""
    scale, (right, bottom) = SHOWN / covers.PIXELS, covers.BADGE
    assert right * scale > BADGE[0] and bottom * scale > BADGE[1]
    assert covers.CUT / covers.PIXELS > 10 / 218
    _, free, cut, _ = drawing(name)
    assert np.abs(free - free[:, :1]).max() <= 2  # each line has one color
    assert np.abs(cut - cut[:1, :1]).max() <= 2


@each
def test_all_text_is_inside_and_legible_where_it_is_shown(name):
    *_, written = drawing(name)
    said = {COVERS[name].model, COVERS[name].about, COVERS[name].format, COVERS[name].card}
    assert said <= {line for line, *_ in written}
    for line, left, right, size in written:
        assert line.isascii(), "the font has no other letters"
        assert left >= 20 and right <= covers.PIXELS - 20, line
        assert size >= 13, line


@each
def test_a_cover_names_the_card_of_the_note(name):
    memory = MADE[name].memory
    if "no GPU" in memory:
        assert COVERS[name].card == re.search(r"Have (\d+ GB)", memory)[1] + " of RAM"
    else:
        assert memory.startswith(("Fits a", "For a")) and COVERS[name].card in memory


def test_what_bars_and_cards_show_is_in_the_notes():
    for name in ("Z-Image Turbo packed to fit your GPU", "Flux.1 dev GGUF placed on an 8 GB card"):
        written = []
        pen = covers.Pen(Image.new("RGB", (covers.PIXELS * covers.SMOOTH,) * 2))
        pen.label = lambda x, middle, text, *_, **__: written.append(text)
        diagrams.draw_diagram(pen, MADE[name])
        numbers = [text.removesuffix(" GB") for text in written if re.match(r"\d+\.\d", text)]
        if "placed" in name:
            on_card, rest = map(float, numbers)
            assert f"{on_card} GB of the model's {on_card + rest:.1f}" in MADE[name].memory
        else:
            assert [*numbers] == re.findall(r"([\d.]+) GB on an? \d+ GB card", MADE[name].memory)


def test_the_first_says_so():
    name = next(iter(MADE))
    assert name.startswith(FIRST) and COVERS[name].about == FIRST
    assert COVERS[name].model == "Z-Image Turbo"


def test_a_model_without_a_color_is_named_up_to_its_format(tmp_path):
    path = tmp_path / "Chroma GGUF with a LoRA.json"
    path.write_text((FOLDER / "Flux.1 dev GGUF.json").read_text(encoding="utf-8"),
                    encoding="utf-8")
    cover = covers.describe(Workflow(path))
    assert (cover.model, cover.about, cover.color) == ("Chroma", "with a LoRA", covers.OTHERS)
    assert covers.draw(Workflow(path)).size == (covers.PIXELS, covers.PIXELS)
