"""Draws the covers of the example workflows, which the template browser shows 238 pixels wide.

A cover shows what the workflow is for (`diagrams.py`), and says the model, its format and which
card it fits. All that it says comes from the workflow's nodes and note.
"""
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from devtools.artwork import BACKGROUND, TEXT
from devtools.workflows import FIRST
from devtools.workflows.diagrams import draw_diagram
from devtools.workflows.pen import PIXELS, SMOOTH, THIN, Pen
from devtools.workflows.workflow import Workflow

MARGIN, SHELF, SYMBOL = 32, 89, 60  # around all; the strip at the bottom; a pictogram in it
CUT = 24  # at the bottom, which the template browser leaves out where a name takes two lines
BADGE = (250, 84)  # of the upper left corner: ComfyUI's template browser puts a badge there
TITLE, ABOUT, CHIP, CARD = 54, 36, 28, 38  # sizes of text
QUALITY = 82
# The models by the beginnings of the workflows' names, and a color for each family.
FAMILIES = {
    "FLUX.2 dev": "#8a3597",
    "FLUX.2 klein 4B": "#8a3597",
    "FLUX.2 klein 9B": "#8a3597",
    "Flux.1 Kontext": "#4a3fa8",
    "Flux.1 dev": "#4a3fa8",
    "Krea 2 Turbo": "#7a5a3a",
    "LTX-2": "#6d6f1d",
    "MiniMax-H3": "#46586e",
    "Qwen-Image": "#2c5fae",
    "Qwen-Image-Edit 2511": "#2c5fae",
    "SD3.5 Medium": "#a8442a",
    "SDXL": "#9a5a17",
    "Stable Diffusion": "#9a5a17",
    "Wan 2.1 14B": "#a32d55",
    "Wan 2.2 14B": "#a32d55",
    "Wan 2.2 5B": "#a32d55",
    "Z-Image Turbo": "#2f7d46",
}
OTHERS = "#5a6270"
PACKED_TYPE = r"I?Q\d_\w+|NF4|int8_convrot|float8_e4m3fn|mxfp8|nvfp4|asym_w4a8_int8|convrot_w4a4"
FIT = "fit this GPU"  # in the place of a type to pack to
FORMAT_WORDS = r"\s*\b(GGUF|NF4|SVDQuant|SDNQ)\b\s*"
# Of the box with the format, by words in it.
CHIPS = {"NF4": "#ffd479", "packed": "#8ff0dd", FIT: "#8ff0dd"}
LOADERS = ("FeatherweightLoadDiffusionModel", "FeatherweightLoadCheckpoint", "UNETLoader")
SAVER = "FeatherweightSavePackedModel"


class Cover(NamedTuple):
    """What a cover says.

    outputs: names of pictograms, or "LoRA".
    """

    model: str
    about: str
    format: str
    card: str
    outputs: tuple[str, ...]
    color: str


def describe(workflow: Workflow) -> Cover:
    """Returns what the cover of a workflow says.

    Raises:
        ValueError: No node loads a model, or the name of its file says no format.
    """
    name = workflow.name.removeprefix(f"{FIRST} - ")
    model = max(filter(name.startswith, FAMILIES), key=len, default="")
    model = model or re.split(FORMAT_WORDS, name)[0]
    about = FIRST if name != workflow.name else re.sub(
        rf"^{FORMAT_WORDS}", "", name.removeprefix(model)).strip()
    return Cover(model, about or _task(workflow), _format(workflow), workflow.card,
                 _outputs(workflow), FAMILIES.get(model, OTHERS))


def _task(workflow: Workflow) -> str:
    return "edits an image" if workflow.types("LoadImage") else "text to image"


def _format(workflow: Workflow) -> str:
    """Returns the type that the model is packed to, else what the names of its files say."""
    saved = [node["widgets_values"][0] for node in workflow.types(SAVER)]
    if saved:
        return "GGUF mix" if "size" in saved[0] else f"GGUF {saved[0]}"
    loaders = workflow.types(*LOADERS)
    if not loaders:
        raise ValueError(f"{workflow.name} has no node that loads a model.")
    file, *values = loaders[0]["widgets_values"]
    if FIT in values:
        return FIT
    packed = [value for value in map(str, values) if re.fullmatch(PACKED_TYPE, value)]
    if packed:
        return f"packed: {packed[0].removesuffix('_convrot')}"
    module = any("fp8" in value for value in map(str, values))
    for pattern, text in {r"svdq-(\w+?)_": "SVDQuant {}", r"(?i)(nf)4": "NF4",
                          r"SDNQ-(\w+?)-": "SDNQ {}",
                          r"(I?Q[0-9]_[0-9A-Z]+(?:_[SML])?)": "GGUF {}"}.items():
        if match := re.search(pattern, file):
            return f"{text.split()[0]} + fp8" if module else text.format(match[1])
    raise ValueError(f"{workflow.name}: the name {file} says no format.")


def _outputs(workflow: Workflow) -> tuple[str, ...]:
    types = {node["type"] for node in workflow.nodes}
    if "SaveVideo" in types:
        sound = any(slot["name"] == "audio" and slot["link"]
                    for node in workflow.types("CreateVideo") for slot in node["inputs"])
        return ("video", "sound") if sound else ("video",)
    if SAVER in types:
        return ("file",)
    if "SaveLoRA" in types:
        return ("LoRA",)
    if "FeatherweightRunOnRay" in types or "SaveImage" not in types:
        return ("images",)
    return ("image",)


def draw(workflow: Workflow) -> Image.Image:
    """Returns the cover."""
    cover = describe(workflow)
    image = _background(cover.color)
    pen = Pen(image)
    width = pen.width(cover.format, CHIP) + 0.9 * CHIP
    pen.text_box(PIXELS - MARGIN - width, 44, cover.format, CHIP, BACKGROUND,
                 chip_color(cover.format))
    draw_diagram(pen, workflow)
    _draw_title(pen, cover)
    _draw_shelf(pen, cover)
    return image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def chip_color(form: str) -> str:
    return next((color for word, color in CHIPS.items() if word in form), TEXT)


def _background(color: str) -> Image.Image:
    """Returns the family's color, darker to the bottom."""
    side = PIXELS * SMOOTH
    bright, dark = (Image.new("RGB", (side, side), value) for value in (color, BACKGROUND))
    shade = Image.linear_gradient("L").resize((side, side)).point(lambda value: value * 0.7)
    return Image.composite(dark, bright, shade)


def _draw_title(pen: Pen, cover: Cover):
    """Writes the model and, below it, what the workflow is about."""
    widest = PIXELS - 2 * MARGIN
    for text, middle, largest in ((cover.model, 343, TITLE), (cover.about, 400, ABOUT)):
        size = next(size for size in range(largest, 20, -1) if pen.width(text, size) <= widest)
        pen.text(MARGIN - 2, middle, text, size, bold=size / 60)


def _draw_shelf(pen: Pen, cover: Cover):
    """Writes the card, and draws what comes out."""
    pen.box(0, PIXELS - SHELF, PIXELS, SHELF, BACKGROUND)
    middle = PIXELS - (SHELF + CUT) / 2
    _draw_card(pen, MARGIN, middle, cover.card)
    pen.text(MARGIN + 62, middle, cover.card, CARD, bold=0.7)
    left = PIXELS - MARGIN
    for name in reversed(cover.outputs):
        left -= _symbol_width(pen, name)
        _draw_symbol(pen, name, left, middle)
        left -= 16


def _draw_card(pen: Pen, left: float, middle: float, text: str):
    """Draws a graphics card, or a module of memory."""
    if "RAM" in text:
        pen.box(left, middle - 14, 48, 24, None, TEXT, 4, 3)
        for step in range(3):
            pen.box(left + 8 + step * 12, middle - 7, 7, 10, TEXT)
            pen.line((left + 10 + step * 14, middle + 10), (left + 10 + step * 14, middle + 17))
        return
    pen.line((left + 1, middle - 22), (left + 1, middle + 24))
    pen.box(left + 4, middle - 16, 46, 30, None, TEXT, 4, 4)
    pen.circle(left + 27, middle - 1, 9, None, TEXT, 4)
    pen.line((left + 12, middle + 18), (left + 32, middle + 18), width=4)


def _symbol_width(pen: Pen, name: str) -> float:
    return SYMBOL if name in SYMBOLS else pen.width(name, 30) + 27


def _draw_symbol(pen: Pen, name: str, left: float, middle: float):
    """Draws a pictogram, or a word in a frame."""
    if name not in SYMBOLS:
        pen.text_box(left, middle, name, 30, TEXT, None)
    else:
        SYMBOLS[name](pen, left, middle - SYMBOL / 2, SYMBOL / 2)


def _image(pen: Pen, x: float, y: float, half: float):
    pen.box(x, y + 3, 2 * half, 2 * half - 6, None, TEXT, THIN, 8)
    pen.circle(x + 19, y + 20, 6)
    pen.polygon((x + 8, y + 48), (x + 26, y + 28), (x + 36, y + 38), (x + 43, y + 30),
                (x + 53, y + 48))


def _images(pen: Pen, x: float, y: float, half: float):
    for shift in (10, 5):
        pen.line((x + shift + 6, y + 10 - shift), (x + 2 * half - 5 + shift, y + 10 - shift),
                 (x + 2 * half - 5 + shift, y + 48 - shift), width=3)
    pen.box(x - 4, y + 12, 2 * half - 8, 2 * half - 16, None, TEXT, THIN, 8)
    pen.circle(x + 11, y + 26, 5)
    pen.polygon((x + 3, y + 48), (x + 18, y + 32), (x + 27, y + 40), (x + 33, y + 34),
                (x + 42, y + 48))


def _video(pen: Pen, x: float, y: float, half: float):
    pen.box(x, y + 5, 2 * half, 2 * half - 10, None, TEXT, THIN, 8)
    pen.polygon((x + 22, y + 17), (x + 22, y + 43), (x + 44, y + 30))


def _sound(pen: Pen, x: float, y: float, half: float):
    for column, share in enumerate((0.3, 0.7, 1, 0.45, 0.8, 0.3)):
        pen.line((x + 5 + 10 * column, y + half - half * share * 0.8),
                 (x + 5 + 10 * column, y + half + half * share * 0.8))


def _file(pen: Pen, x: float, y: float, half: float):
    pen.line((x + 34, y + 3), (x + 8, y + 3), (x + 8, y + 57), (x + 52, y + 57), (x + 52, y + 21),
             (x + 34, y + 3), (x + 34, y + 21), (x + 52, y + 21))


SYMBOLS = {"image": _image, "images": _images, "video": _video, "sound": _sound, "file": _file}


def save(path: Path):
    """Draws the cover of the workflow at `path` next to it."""
    draw(Workflow(path)).save(path.with_suffix(".jpg"), quality=QUALITY, optimize=True,
                              progressive=True)
