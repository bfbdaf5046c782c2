"""Draws the covers of the example workflows, which the template browser shows 256 pixels high.

A cover says the model, its format, what its weights take and which card holds them, and what goes
in and comes out. All of it comes from the workflow's nodes and note.
"""
import re
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image, ImageColor, ImageDraw, ImageFont

from devtools import ROOT
from devtools.artwork import BACKGROUND, TEXT, draw_feather
from devtools.demo_sheet import BELOW, COLUMNS, GAP, SIDE, TOP
from devtools.workflows import DEMO, FIRST
from devtools.workflows.workflow import Workflow

PIXELS, SMOOTH = 512, 2  # of a side of a cover; drawn for each of them
MARGIN, SHELF, SYMBOL = 32, 104, 60  # around all; the strip at the bottom; a pictogram in it
THIN, SPACE = 5, 8  # lines of pictograms; between pictures
ABOUT, LABEL = 50, 30  # sizes of text
QUALITY = 82
SHEET = ROOT / "demo_model" / "sheet.png"
SHEET_TITLES = ("dense", "Q8_0", "Q4_K", "mix", "NF4", "Q2_K")  # its pictures, in their order
# The models by the beginnings of the workflows' names, and a colour for each family.
FAMILIES = {
    DEMO: "#1f6f78",
    "Flux.1 dev": "#4a3fa8",
    "Flux.1 schnell": "#4a3fa8",
    "Flux.1 Kontext": "#4a3fa8",
    "Flux 2 Klein": "#8a3597",
    "Stable Diffusion": "#9a5a17",
    "SDXL": "#9a5a17",
    "SD3.5 Large": "#a8442a",
    "SD3.5 Large Turbo": "#a8442a",
    "SD3.5 Medium": "#a8442a",
    "Qwen-Image": "#2c5fae",
    "Qwen-Image-Edit": "#2c5fae",
    "Z-Image Turbo": "#2f7d46",
    "Wan 2.1 14B": "#a32d55",
    "Wan 2.2 5B": "#a32d55",
    "Wan 2.2 14B": "#a32d55",
    "LTX-2": "#6d6f1d",
}
OTHERS = "#5a6270"
PACKED_TYPE = r"I?Q\d_\w+|NF4|int8_convrot|float8_e4m3fn|mxfp8|nvfp4|asym_w4a8_int8"
FIT = "fit this GPU"  # in the place of a type to pack to
FORMAT_WORDS = r"\s*\b(GGUF|NF4|SVDQuant|SDNQ)\b\s*"
# Of the box with the format, by words in it.
CHIPS = {"NF4": "#ffd479", "packed": "#8ff0dd", "packings": "#8ff0dd", FIT: "#8ff0dd"}
# Sentences of a note with the figure on the cover, the first that matches, and what the figure is.
FIGURES = {
    r"On the card: ([\d.]+ GB)": "on the card",
    r"([\d.]+ GB) on a card of 8 GB": "on a card of 8 GB",
    r"Have (\d+ GB) of main memory": "of main memory",
    r"takes ([\d.]+ GB) of main memory": "of main memory",
    r"file that is made takes ([\d.]+ [GM]B)": "in the file",
    r"[Mm]odel(?: and module| of this file|, which)? takes? (?:about )?([\d.]+ [GM]B)":
        "of weights",
}
CARD = r"whole on a card of (\d+ GB)"
LOADERS = ("FeatherweightLoadDiffusionModel", "FeatherweightLoadCheckpoint", "UNETLoader")
LORA_NODES = ("LoraLoader", "LoraLoaderModelOnly", "FeatherweightApplyLora")
SAVER = "FeatherweightSavePackedModel"


class Cover(NamedTuple):
    """What a cover says. inputs, outputs: names of pictograms, or "LoRA", "2 LoRAs".

    weights: a figure and what it is, or None.
    """

    model: str
    about: str
    format: str
    weights: tuple[str, str] | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    colour: str
    pictures: tuple[str, ...]


def describe(workflow: Workflow) -> Cover:
    """Returns what the cover of a workflow says.

    Raises:
        ValueError: No node loads a model, or the name of its file says no format.
    """
    name = workflow.name.removeprefix(f"{FIRST} - ")
    model = max(filter(name.startswith, FAMILIES), key=len, default="")
    model = model or re.split(FORMAT_WORDS, name)[0]
    about = re.sub(rf"^{FORMAT_WORDS}", "", name.removeprefix(model)).strip()
    if name != workflow.name:
        about = f"{FIRST}: {about}"
    form = _format(workflow)
    return Cover(model, about, form, _weights(workflow), _inputs(workflow), _outputs(workflow),
                 FAMILIES.get(model, OTHERS), _sheet_pictures(workflow, form))


def _weights(workflow: Workflow) -> tuple[str, str] | None:
    for pattern, label in FIGURES.items():
        if figure := workflow.figure(pattern):
            card = label == "of weights" and workflow.figure(CARD)
            return figure, f"fits {card} cards" if card else label
    return None


def _format(workflow: Workflow) -> str:
    """Returns the type that the model is packed to, else what the names of its files say."""
    saved = [node["widgets_values"][0] for node in workflow.types(SAVER)]
    if saved:
        return "GGUF mix" if "size" in saved[0] else f"GGUF {saved[0]}"
    loaders = workflow.types(*LOADERS)
    if not loaders:
        raise ValueError(f"{workflow.name} has no node that loads a model.")
    (file, *values), count = (
        loaders[0]["widgets_values"], len({node["widgets_values"][0] for node in loaders}))
    if count > 2:
        return f"{count} packings"
    if FIT in values:
        return FIT
    packed = [value for value in map(str, values) if re.fullmatch(PACKED_TYPE, value)]
    if packed:
        return f"packed to {packed[0]}"
    module = " + fp8" if any("fp8" in value for value in map(str, values)) else ""
    for pattern, text in {r"svdq-(\w+?)_": "SVDQuant {}", r"(?i)(nf)4": "NF4",
                          r"SDNQ-(\w+?)-": "SDNQ {}",
                          r"(I?Q[0-9]_[0-9A-Z]+(?:_[SML])?)": "GGUF {}"}.items():
        if match := re.search(pattern, file):
            return text.format(match[1]) + module
    raise ValueError(f"{workflow.name}: the name {file} says no format.")


def _inputs(workflow: Workflow) -> tuple[str, ...]:
    types = {node["type"] for node in workflow.nodes}
    inputs = ["text"] if any(type.startswith(("CLIPTextEncode", "TextEncode")) for type in types) \
        else []
    if "LoadImage" in types:
        inputs.append("picture")
    loras = {node["widgets_values"][0] for node in workflow.types(*LORA_NODES)}
    if loras:
        inputs.append("LoRA" if len(loras) == 1 else f"{len(loras)} LoRAs")
    return (*inputs,)


def _outputs(workflow: Workflow) -> tuple[str, ...]:
    types = {node["type"] for node in workflow.nodes}
    if "SaveVideo" in types:
        sound = any(slot["name"] == "audio" and slot["link"]
                    for node in workflow.types("CreateVideo") for slot in node["inputs"])
        return ("video", "sound") if sound else ("video",)
    if SAVER in types:
        return ("file",)
    if "SaveLoRA" in types:
        return ("LoRA", "picture")
    if "FeatherweightRunOnRay" in types or "SaveImage" not in types:
        return ("pictures",)
    return ("picture",)


def _sheet_pictures(workflow: Workflow, form: str) -> tuple[str, ...]:
    """Returns which pictures of the demo's sheet the workflow draws."""
    if not workflow.name.startswith(DEMO):
        return ()
    shown = [node.get("title") for node in workflow.types("PreviewImage")]
    if not shown and not workflow.types(*LORA_NODES, SAVER, "FeatherweightLoadCheckpoint"):
        shown = [form.removeprefix("GGUF ")]
    return tuple(title for title in SHEET_TITLES if title in shown)


class Pen:
    """Draws on a cover in pixels of the finished one."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def width(self, text: str, size: float) -> float:
        return self.draw.textlength(text, _font(size)) / SMOOTH

    def text(self, left: float, middle: float, text: str, size: float, colour=TEXT, bold=0.0):
        """Writes a line with its middle at that height."""
        self.draw.text((left * SMOOTH, middle * SMOOTH), text, colour, _font(size), "lm",
                       stroke_width=bold * SMOOTH)

    def box(self, left, top, width, height, fill=None, outline=None, line=0, radius=0.0):
        corners = [value * SMOOTH for value in (left, top, left + width, top + height)]
        self.draw.rounded_rectangle(corners, radius * SMOOTH, fill, outline, line * SMOOTH)

    def text_box(self, left, middle, text: str, size: float, colour, fill) -> float:
        """Writes a line in a box, framed where there is no colour to fill it; returns its width."""
        width, height = self.width(text, size) + 0.9 * size, 1.6 * size
        outline, radius = (None, 14) if fill else (colour, height / 2)
        self.box(left, middle - height / 2, width, height, fill, outline, 4, radius)
        self.text(left + 0.45 * size, middle, text, size, colour, bold=0.5)
        return width

    def line(self, *points, colour=TEXT, width=THIN):
        self.draw.line([(x * SMOOTH, y * SMOOTH) for x, y in points], colour, width * SMOOTH,
                       joint="curve")

    def polygon(self, *points, fill=TEXT):
        self.draw.polygon([(x * SMOOTH, y * SMOOTH) for x, y in points], fill)

    def circle(self, x, y, radius, fill=TEXT):
        self.draw.ellipse([value * SMOOTH for value in (x - radius, y - radius, x + radius,
                                                        y + radius)], fill)


def _font(size: float) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size * SMOOTH))


def draw(cover: Cover) -> Image.Image:
    """Returns the cover as a picture."""
    image = _background(cover.colour)
    pen = Pen(image)
    top = _draw_title(pen, cover)
    space = PIXELS - SHELF - top
    pen.text_box(MARGIN, top + 0.3 * space, cover.format, 38, BACKGROUND, chip_colour(cover.format))
    if len(cover.pictures) == 1:
        _paste_row(image, cover.pictures, PIXELS - MARGIN - 176, top + 10, 176)
    elif cover.pictures:
        _paste_row(image, cover.pictures, MARGIN, top + 0.5 * space, 68)
    if cover.weights:
        figure, label = cover.weights
        middle, left = top + 0.74 * space, MARGIN + pen.width(figure, 60) + 18
        pen.text(MARGIN, middle, figure, 60, bold=1)
        lines = _wrap(pen, label, LABEL, PIXELS - MARGIN - left)
        for line, text in enumerate(lines):
            pen.text(left, middle + 2 + (line - (len(lines) - 1) / 2) * 32, text, LABEL)
    _draw_shelf(pen, cover)
    return image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def chip_colour(form: str) -> str:
    return next((colour for word, colour in CHIPS.items() if word in form), TEXT)


def _background(colour: str) -> Image.Image:
    """Returns the family's colour, darker to the bottom, with the pack's feather in it."""
    side = PIXELS * SMOOTH
    bright, dark = (Image.new("RGB", (side, side), value) for value in (colour, BACKGROUND))
    shade = Image.linear_gradient("L").resize((side, side)).point(lambda value: value * 0.6)
    image = Image.composite(dark, bright, shade)
    feather = Image.new("RGBA", (side, side), (*ImageColor.getrgb(colour), 0))
    draw_feather(ImageDraw.Draw(feather), side * 0.8, side * 0.34, side * 0.72)
    feather.putalpha(feather.getchannel("A").point(lambda value: value * 0.18))
    image.paste(feather, mask=feather)
    return image


def _draw_title(pen: Pen, cover: Cover) -> float:
    """Writes the model and what the workflow is about; returns the height where that ends."""
    room = PIXELS - 2 * MARGIN
    largest = 60 if cover.about else 78
    size = next(size for size in range(largest, 28, -2) if pen.width(cover.model, size) <= room)
    middle = MARGIN + size * 0.45
    pen.text(MARGIN - 2, middle, cover.model, size, bold=size / 60)
    top = middle + size * 0.62
    for line in _wrap(pen, cover.about, ABOUT, room):
        pen.text(MARGIN, top + 26, line, ABOUT, bold=0.7)
        top += 54
    return top


def _wrap(pen: Pen, text: str, size: float, room: float) -> list[str]:
    lines = []
    for word in re.findall(r"\S+(?: GB\b)?", text):
        if lines and pen.width(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _paste_row(image: Image.Image, titles: tuple[str, ...], left: float, top: float, side: int):
    """Puts pictures of the demo's sheet in a row."""
    with Image.open(SHEET) as sheet:
        for index, title in enumerate(titles):
            row, column = divmod(SHEET_TITLES.index(title), COLUMNS)
            x, y = GAP + column * (SIDE + GAP), TOP + row * (SIDE + BELOW)
            picture = sheet.convert("RGB").crop((x, y, x + SIDE, y + SIDE)).resize(
                (side * SMOOTH, side * SMOOTH), Image.Resampling.LANCZOS)
            image.paste(picture, (round((left + index * (side + SPACE)) * SMOOTH),
                                  round(top * SMOOTH)))


def _draw_shelf(pen: Pen, cover: Cover):
    """Draws what goes in, an arrow, and what comes out."""
    pen.box(0, PIXELS - SHELF, PIXELS, SHELF, BACKGROUND)
    middle, left = PIXELS - SHELF / 2, MARGIN
    for name in (*cover.inputs, "arrow", *cover.outputs):
        left += _draw_symbol(pen, name, left, middle) + 20


def _draw_symbol(pen: Pen, name: str, left: float, middle: float) -> float:
    """Draws a pictogram, or a word in a frame; returns its width."""
    top, half = middle - SYMBOL / 2, SYMBOL / 2
    if name not in SYMBOLS:
        return pen.text_box(left, middle, name, 30, TEXT, None)
    SYMBOLS[name](pen, left, top, half)
    return SYMBOL


def _text(pen: Pen, x: float, y: float, half: float):
    for row, share in enumerate((1, 0.8, 1, 0.55)):
        pen.line((x, y + 9 + 14 * row), (x + 2 * half * share, y + 9 + 14 * row), width=6)


def _picture(pen: Pen, x: float, y: float, half: float):
    pen.box(x, y + 3, 2 * half, 2 * half - 6, None, TEXT, THIN, 8)
    pen.circle(x + 19, y + 20, 6)
    pen.polygon((x + 8, y + 48), (x + 26, y + 28), (x + 36, y + 38), (x + 43, y + 30),
                (x + 53, y + 48))


def _pictures(pen: Pen, x: float, y: float, half: float):
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


def _arrow(pen: Pen, x: float, y: float, half: float):
    pen.line((x + 4, y + half), (x + 50, y + half))
    pen.polygon((x + 38, y + half - 16), (x + 58, y + half), (x + 38, y + half + 16))


SYMBOLS = {"text": _text, "picture": _picture, "pictures": _pictures, "video": _video,
           "sound": _sound, "file": _file, "arrow": _arrow}


def save(path: Path):
    """Draws the cover of the workflow at `path` next to it."""
    draw(describe(Workflow(path))).save(path.with_suffix(".jpg"), quality=QUALITY, optimize=True,
                                        progressive=True)
