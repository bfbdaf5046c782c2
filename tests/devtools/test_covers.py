"""The covers of the example workflows say what their workflows do.

A cover is a JPEG of 512 x 512 pixels of the workflow's name. What is written on it, and what its
signs show that comes out, is its comment too, as JSON, which is compared with the workflow.
"""
import json
import re

import numpy as np
import pytest
from PIL import Image

from devtools.workflows import FIRST, FOLDER, example_paths
from devtools.workflows.workflow import Workflow

MADE = {path.stem: Workflow(path) for path in example_paths()}
PACKED_TYPE = r"I?Q\d_\w+|NF4|int8_convrot|float8_e4m3fn|mxfp8|nvfp4|asym_w4a8_int8|convrot_w4a4"
FIT = "fit this GPU"
FORMAT_WORDS = r"\s*\b(GGUF|NF4|SVDQuant|SDNQ)\b\s*"
SIDE = 512
# Of a cover, in its pixels: where the template browser puts a badge (108 x 34 of the 238 that it
# shows, in editor 1.58.1), and what it cuts at the bottom for a name of two lines (10 of 218).
BADGE, CUT = (240, 78), 24
each = pytest.mark.parametrize("name", MADE)


def about_of(workflow: Workflow, model: str) -> str:
    name = workflow.name.removeprefix(f"{FIRST} - ")
    if name != workflow.name:
        return FIRST
    rest = re.sub(rf"^{FORMAT_WORDS}", "", name.removeprefix(model)).strip()
    return rest or ("edits an image" if workflow.types("LoadImage") else "text to image")


def format_of(workflow: Workflow) -> str:
    """The type that the model is packed to, else what the names of its files say."""
    saved = [node["widgets_values"][0] for node in workflow.types("FeatherweightSavePackedModel")]
    if saved:
        return "GGUF mix" if "size" in saved[0] else f"GGUF {saved[0]}"
    loader, *_ = workflow.types("FeatherweightLoadDiffusionModel", "FeatherweightLoadCheckpoint",
                                "UNETLoader")
    file, *values = loader["widgets_values"]
    if FIT in values:
        return FIT
    packed = [value for value in map(str, values) if re.fullmatch(PACKED_TYPE, value)]
    if packed:
        return f"packed: {packed[0].removesuffix('_convrot')}"
    module = any("fp8" in value for value in map(str, values))
    patterns = {r"svdq-(\w+?)_": "SVDQuant {}", r"(?i)(nf)4": "NF4", r"SDNQ-(\w+?)-": "SDNQ {}",
                r"(I?Q[0-9]_[0-9A-Z]+(?:_[SML])?)": "GGUF {}"}
    text, match = next((text, match) for pattern, text in patterns.items()
                       if (match := re.search(pattern, file)))
    return f"{text.split()[0]} + fp8" if module else text.format(match[1])


def outputs_of(workflow: Workflow) -> list[str]:
    types = {node["type"] for node in workflow.nodes}
    if "SaveVideo" in types:
        sound = any(slot["name"] == "audio" and slot["link"]
                    for node in workflow.types("CreateVideo") for slot in node["inputs"])
        return ["video", "sound"] if sound else ["video"]
    for type_name, output in {"FeatherweightSavePackedModel": "file", "SaveLoRA": "LoRA",
                              "FeatherweightRunOnRay": "images"}.items():
        if type_name in types:
            return [output]
    return ["image"] if "SaveImage" in types else ["images"]


def test_every_workflow_has_a_cover_and_no_cover_is_without_a_workflow():
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(MADE)


@each
def test_a_cover_says_what_the_workflow_does(name):
    path, workflow = FOLDER / f"{name}.jpg", MADE[name]
    with Image.open(path) as cover:
        assert cover.format == "JPEG" and cover.size == (SIDE, SIDE)
        said = json.loads(cover.info["comment"])
    assert path.stat().st_size < 60_000
    assert name.removeprefix(f"{FIRST} - ").startswith(said["model"])
    assert said == {"model": said["model"], "about": about_of(workflow, said["model"]),
                    "format": format_of(workflow), "card": workflow.card,
                    "outputs": outputs_of(workflow)}, "make another cover, with this comment"
    assert workflow.card and name.startswith(FIRST) == (said["about"] == FIRST)


@each
def test_the_corner_of_the_badge_and_the_bottom_that_the_browser_cuts_are_free(name):
    """Up to what a JPEG loses."""
    with Image.open(FOLDER / f"{name}.jpg") as cover:
        pixels = np.asarray(cover.convert("RGB"), np.int16)
    corner, cut = pixels[:BADGE[1], :BADGE[0]], pixels[-CUT:]
    assert np.abs(corner - corner[:, :1]).mean() < 2  # each line has one color
    assert np.abs(cut - cut.mean((0, 1))).mean() < 2
