"""Draws the covers of the example workflows, which the template browser shows 256 pixels high:
`python -m devtools.workflows.covers`, from the root.

A cover says the model, its format, what its weights take, and what goes in and comes out. All of it
comes from the workflow; only what the names of files do not tell is listed here.
"""
import re
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

from devtools import ROOT
from devtools.artwork import BACKGROUND, TEXT, draw_feather
from devtools.demo_sheet import BELOW, COLUMNS, GAP, SIDE, TOP
from devtools.workflows import FOLDER, WORKFLOWS
from devtools.workflows.editor import Node, Workflow

PIXELS, SMOOTH = 512, 2  # of a side of a cover; drawn for each of them
MARGIN, SHELF, SYMBOL = 32, 104, 60  # around all; the strip at the bottom; a pictogram in it
THIN, SPACE = 5, 8  # lines of pictograms; between pictures
QUALITY = 82
SHEET = ROOT / "demo_model" / "sheet.png"
SHEET_TITLES = ("dense", "Q8_0", "Q4_K", "mix", "NF4", "Q2_K")  # its pictures, in their order
# The models by the beginnings of the workflows' names, and a colour for each family.
FAMILIES = {
    "Featherweight demo": "#1f6f78",
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
# Of the box with the format, by words in it.
CHIPS = {"NF4": "#ffd479", "packed": "#8ff0dd", "six": "#8ff0dd"}
HELD = "held in memory"
# What the weights take where that is not the size of the model's file. The workflow's note has each
# figure; those of the demo are the sizes of its files.
WEIGHTS = {
    "Featherweight demo": ("8.2 MB", HELD),
    "Featherweight demo NF4 checkpoint": ("4.1 MB", HELD),
    "Featherweight demo two LoRAs": ("8.2 MB", HELD),
    "Featherweight demo packed to a size": ("5 MB", "in the file"),
    "Featherweight demo on Ray": ("8.2 MB", "on each worker"),
    "Featherweight demo train a LoRA": ("4.8 MB", HELD),
    "Flux.1 dev NF4 all-in-one": ("6.7 GB", HELD),
    "Flux.1 dev NF4 with two LoRAs": ("6.7 GB", HELD),
    "Flux.1 dev 4-bit package on 8 GB": ("6.7 GB", HELD),
    "Flux.1 dev GGUF with a budget on 8 GB": ("5.0 GB", "on the GPU"),
    "Flux.1 dev packed while it loads": ("6.8 GB", HELD),
    "Flux.1 dev two LoRAs into a GGUF": ("6.8 GB", "in the file"),
    "Qwen-Image SDNQ": ("12 GB", HELD),
    "Stable Diffusion GGUF all-in-one": ("1.5 GB", HELD),
    "Stable Diffusion LCM on a CPU": ("1.5 GB", HELD),
    "SDXL GGUF with LCM and style LoRAs": ("3.2 GB", HELD),
    "Wan 2.1 14B VACE module": ("13.2 GB", HELD),
    "Wan 2.2 14B GGUF video in 4 steps": ("9.8 GB", "each of two"),
}
# Formats that the names of files do not tell.
FORMATS = {
    "Featherweight demo packed to a size": "GGUF mix",
    "Featherweight demo side by side": "six packings",
    "Flux.1 dev 4-bit package on 8 GB": "NF4",
    "Flux.1 dev SVDQuant with a LoRA": "SVDQuant int4",
    "Qwen-Image SDNQ": "SDNQ uint4",
    "Wan 2.1 14B VACE module": "GGUF Q4_K_M + fp8",
}
# Which pictures of the demo's sheet a workflow draws.
PICTURES = {
    "Featherweight demo": ("Q8_0",),
    "Featherweight demo side by side": SHEET_TITLES,
}
LOADERS = ("FeatherweightLoadDiffusionModel", "FeatherweightLoadCheckpoint", "UNETLoader")
LORA_NODES = ("LoraLoader", "LoraLoaderModelOnly", "FeatherweightApplyLora")


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
    """Returns what the cover of a workflow says."""
    name = workflow.name
    model = max(filter(name.startswith, FAMILIES), key=len)
    about = name.removeprefix(model).strip()
    loader = next(node for node in workflow.nodes if node.type in LOADERS)
    form = FORMATS.get(name) or _format(loader, workflow)
    weights = WEIGHTS.get(name) or (loader.files[0].size and (loader.files[0].size, HELD)) or None
    about = re.sub(r"^(GGUF|NF4|SVDQuant|SDNQ)\s*", "", about)
    return Cover(model, about, form, weights, _inputs(workflow), _outputs(workflow),
                 FAMILIES[model], PICTURES.get(name, ()))


def _format(loader: Node, workflow: Workflow) -> str:
    """Returns the type that the model is packed to, else the one in the name of its file."""
    saved = (node for node in workflow.nodes if node.type == "FeatherweightSavePackedModel")
    if saver := next(saved, None):
        return f"GGUF {saver.inputs['type']}"
    if packed := loader.inputs.get("pack_to"):
        return f"packed to {packed}"
    file = loader.files[0].name
    if "nf4" in file.lower():
        return "NF4"
    return f"GGUF {re.search(r'I?Q[0-9]_[0-9A-Z]+(_[SML])?', file)[0]}"


def _inputs(workflow: Workflow) -> tuple[str, ...]:
    types = {node.type for node in workflow.nodes}
    inputs = ["text"] if any(type.startswith(("CLIPTextEncode", "TextEncode")) for type in types) \
        else []
    if "LoadImage" in types:
        inputs.append("picture")
    loras = {node.inputs["lora_name"] for node in workflow.nodes if node.type in LORA_NODES}
    if loras:
        inputs.append("LoRA" if len(loras) == 1 else f"{len(loras)} LoRAs")
    return (*inputs,)


def _outputs(workflow: Workflow) -> tuple[str, ...]:
    nodes = {node.type: node for node in workflow.nodes}
    if "SaveVideo" in nodes:
        return ("video", "sound") if "audio" in nodes["CreateVideo"].inputs else ("video",)
    if "FeatherweightSavePackedModel" in nodes:
        return ("file",)
    if "SaveLoRA" in nodes:
        return ("LoRA", "picture")
    if "FeatherweightRunOnRay" in nodes or "SaveImage" not in nodes:
        return ("pictures",)
    return ("picture",)


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
    return ImageFont.load_default(size * SMOOTH)


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
        middle = top + 0.74 * space
        pen.text(MARGIN, middle, figure, 60, bold=1)
        pen.text(MARGIN + pen.width(figure, 60) + 14, middle + 8, label, 30)
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
    size = next(size for size in range(78, 30, -2) if pen.width(cover.model, size) <= room)
    middle = MARGIN + size * 0.45
    pen.text(MARGIN - 2, middle, cover.model, size, bold=size / 60)
    top = middle + size * 0.62
    lines = _wrap(pen, cover.about, 40, room)
    for line in lines:
        pen.text(MARGIN, top + 22, line, 40)
        top += 46
    return top


def _wrap(pen: Pen, text: str, size: float, room: float) -> list[str]:
    lines = []
    for word in text.split():
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
                (side * SMOOTH,) * 2, Image.Resampling.LANCZOS)
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


def main():
    for make in WORKFLOWS:
        workflow = make()
        path = FOLDER / f"{workflow.name}.jpg"
        draw(describe(workflow)).save(path, quality=QUALITY, optimize=True, progressive=True)
        print(f"{workflow.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
