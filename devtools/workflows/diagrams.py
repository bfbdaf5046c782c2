"""The drawings on the covers: each says what its workflow is for.

Images that a model would generate are scenes that code draws; those of the demo are its own.
"""
from collections.abc import Callable

from PIL import Image

from devtools import ROOT
from devtools.artwork import BACKGROUND, TEXT
from devtools.demo_sheet import BELOW, COLUMNS, GAP, TOP
from devtools.demo_sheet import SIDE as SHEET_SIDE
from devtools.workflows import FIRST, scenes
from devtools.workflows.pen import Pen
from devtools.workflows.scenes import Scene
from devtools.workflows.workflow import Workflow

LEFT, WIDE, UPPER, LOWER = 32, 448, 96, 306  # of the drawing, in pixels of a cover
MIDDLE, HEIGHT = (UPPER + LOWER) / 2, LOWER - UPPER
LABEL = 28  # size of text
MINT, GOLD, PALE, DARK = "#8ff0dd", "#ffd479", "#c9d2dc", "#20262f"
SHEET = ROOT / "demo_model" / "sheet.png"
SHEET_TITLES = ("dense", "Q8_0", "Q4_K", "mix", "NF4", "Q2_K")  # its images, in their order
Diagram = Callable[[Pen, Workflow], None]


# parts


def _image(pen: Pen, image: Image.Image, left, top, width, height):
    pen.box(left - 3, top - 3, width + 6, height + 6, TEXT, radius=15)
    pen.paste(image, left, top, width, height)


def _scene(pen: Pen, scene: Scene, left, top, width, height, time=0.0):
    _image(pen, scene(width / height, time), left, top, width, height)


def _wide(pen: Pen, scene: Scene):
    _scene(pen, scene, LEFT, UPPER, WIDE, HEIGHT)


def _arrow(pen: Pen, left, right, middle=MIDDLE):
    pen.line((left, middle), (right - 12, middle), width=6)
    pen.polygon((right - 18, middle - 14), (right, middle), (right - 18, middle + 14))


def _block(pen: Pen, left, top, width, height, title: str, color=MINT, rows=2):
    """A model: its name above the cells of its packed weights."""
    pen.box(left, top, width, height, DARK, color, 4, 12)
    cells, side = int((width - 14) // 22), 16
    pitch = (width - 2 * 14 - side) / max(1, cells - 1)
    first = top + height - 12 - rows * 22 + 6
    pen.label(left + width / 2, (top + first - 4) / 2 + 1, title, LABEL, bold=0.5)
    for row in range(rows):
        for column in range(cells):
            shade = (color, PALE, color, TEXT)[(row * 3 + column * 5) % 4]
            pen.box(left + 14 + column * pitch, first + row * 22, side, side, shade, radius=3)


def _plain(pen: Pen, left, top, width, height, title: str, color=PALE, text=TEXT):
    """A part with a name."""
    pen.box(left, top, width, height, DARK, color, 4, 12)
    pen.label(left + width / 2, top + height / 2 + 1, title, LABEL, text, bold=0.5)


def _lora(pen: Pen, left, top, width, height, title="LoRA"):
    """A part that is put on a model."""
    pen.box(left, top, width, height, GOLD, radius=12)
    pen.label(left + width / 2, top + height / 2 + 1, title, LABEL, BACKGROUND, bold=0.5)


def _plus(pen: Pen, x, y, half=12):
    pen.line((x - half, y), (x + half, y), width=6)
    pen.line((x, y - half), (x, y + half), width=6)


def _gpu(pen: Pen, left, top, width, height, title: str):
    """A graphics card: what is on it is drawn above its title."""
    pen.box(left, top, width, height, DARK, PALE, 4, 10)
    pen.line((left - 9, top - 8), (left - 9, top + height + 14), color=PALE)
    pen.box(left + 18, top + height, width * 0.55, 10, GOLD)
    pen.label(left + width / 2, top + height - 24, title, LABEL)


def _chip(pen: Pen, left, top, side, title: str):
    """A processor."""
    for step in range(1, 6):
        shift = step * side / 6
        pen.line((left + shift, top - 16), (left + shift, top + side + 16), color=PALE)
        pen.line((left - 16, top + shift), (left + side + 16, top + shift), color=PALE)
    pen.box(left, top, side, side, DARK, PALE, 4, 12)
    pen.label(left + side / 2, top + side / 2, title, 46, bold=1)


def _file(pen: Pen, left, top, width, height, fold=34):
    corner = left + width - fold
    pen.polygon((left, top), (corner, top), (left + width, top + fold),
                (left + width, top + height), (left, top + height), fill=TEXT)
    pen.polygon((corner, top), (left + width, top + fold), (corner, top + fold), fill=PALE)


def _check(pen: Pen, x, y, color=MINT):
    pen.line((x - 14, y), (x - 4, y + 11), (x + 15, y - 13), color=color, width=8)


def _cross(pen: Pen, x, y, color="#ff8f80"):
    pen.line((x - 12, y - 12), (x + 12, y + 12), color=color, width=8)
    pen.line((x - 12, y + 12), (x + 12, y - 12), color=color, width=8)


def _film(pen: Pen, scene: Scene, left, top, width, height, frames=3, sound=False):
    """A strip of frames, and the wave of its sound below."""
    wave = 52 if sound else 0
    tall = height - wave
    pen.box(left, top, width, tall, "#07090c", radius=10)
    count = int(width // 26)
    for hole in range(count):
        x = left + (hole + 0.5) * width / count - 6
        for y in (top + 7, top + tall - 17):
            pen.box(x, y, 12, 10, TEXT, radius=3)
    wide, inner = (width - 8 * (frames + 1)) / frames, tall - 48
    for frame in range(frames):
        picture = scene(wide / inner, frame / (frames - 1))
        pen.paste(picture, left + 8 + frame * (wide + 8), top + 24, wide, inner, radius=4)
    bars = int(width // 14) if sound else 0
    for bar in range(bars):
        share = (0.25, 0.6, 1, 0.7, 0.35, 0.85, 0.5, 0.2, 0.75)[bar * 4 % 9]
        x, y = left + 7 + bar * width / bars, top + height - 20
        pen.line((x, y - 20 * share), (x, y + 20 * share), color=MINT, width=6)


def _of_sheet(title: str) -> Image.Image:
    """An image of the sheet that the demo makes."""
    row, column = divmod(SHEET_TITLES.index(title), COLUMNS)
    x, y = GAP + column * (SHEET_SIDE + GAP), TOP + row * (SHEET_SIDE + BELOW)
    with Image.open(SHEET) as sheet:
        return sheet.convert("RGB").crop((x, y, x + SHEET_SIDE, y + SHEET_SIDE))


# diagrams, by the names of workflows


def _fit_cards(pen: Pen, workflow: Workflow):
    """One model on cards of three sizes, as its note says."""
    scenes_top, cards = UPPER + 6, ((6, 112), (8, 142), (12, 172))
    left = LEFT + 12
    for gib, width in cards:
        size = workflow.figure(rf"([\d.]+ GB) on an? {gib} GB card")
        height = HEIGHT - 30 - (172 - width) * 0.7
        top = scenes_top + HEIGHT - 30 - height
        _gpu(pen, left, top, width - 22, height, f"{gib} GB")
        pen.box(left + 12, top + 14, width - 46, height - 62, MINT, radius=8)
        pen.label(left + (width - 22) / 2, top + 14 + (height - 62) / 2,
                  size.removesuffix(" GB"), 34, BACKGROUND, bold=0.8)
        left += width + 14


def _outpainting(pen: Pen, workflow: Workflow):
    """An image that gets larger, and a LoRA that fits or does not."""
    height = 134
    whole = scenes.hills(196 / height)
    part = Image.new("RGB", whole.size, "#00c800")
    box = whole.width // 4, whole.height // 5, whole.width * 3 // 4, whole.height * 4 // 5
    part.paste(whole.crop(box), box[:2])
    _image(pen, part, LEFT, UPPER, 196, height)
    _arrow(pen, LEFT + 207, LEFT + 241, UPPER + height / 2)
    _image(pen, whole, LEFT + WIDE - 196, UPPER, 196, height)
    for left, mark in ((LEFT, _check), (LEFT + WIDE - 196, _cross)):
        _lora(pen, left, UPPER + 152, 120, 54)
        mark(pen, left + 152, UPPER + 179)


def _editing(pen: Pen, scene: Scene):
    _scene(pen, scene, LEFT, UPPER + 6, 184, 198)
    _arrow(pen, LEFT + 202, LEFT + 246)
    _scene(pen, scene, LEFT + 264, UPPER + 6, 184, 198, 1)


def _edit_with_eye(pen: Pen, workflow: Workflow):
    _scene(pen, scenes.apple, LEFT, UPPER + 6, 150, 198)
    x, y = LEFT + WIDE / 2, MIDDLE - 30
    pen.polygon((x - 52, y), (x - 26, y - 26), (x, y - 34), (x + 26, y - 26), (x + 52, y),
                (x + 26, y + 26), (x, y + 34), (x - 26, y + 26))
    pen.circle(x, y, 23, "#2c5fae")
    pen.circle(x, y, 11, BACKGROUND)
    pen.label(x, y + 60, "mmproj", LABEL, bold=0.5)
    _arrow(pen, x - 48, x + 52, y + 96)
    _scene(pen, scenes.apple, LEFT + WIDE - 150, UPPER + 6, 150, 198, 1)


def _to_int8(pen: Pen, workflow: Workflow):
    _block(pen, LEFT, UPPER + 8, 158, 130, "Q8_0", PALE, 3)
    _arrow(pen, LEFT + 172, LEFT + 232, UPPER + 73)
    _block(pen, LEFT + 248, UPPER + 8, 200, 130, "int8_convrot", MINT, 3)
    pen.label(LEFT + 336, UPPER + 176, "ComfyUI's kernels", LABEL)
    _plus(pen, LEFT + 8, UPPER + 176)
    _lora(pen, LEFT + 38, UPPER + 150, 120, 54)


def _control(pen: Pen, workflow: Workflow):
    outlines = scenes.outlines(scenes.balloon(1))
    _image(pen, outlines, LEFT, UPPER + 6, 184, 198)
    _arrow(pen, LEFT + 202, LEFT + 246)
    _scene(pen, scenes.balloon, LEFT + 264, UPPER + 6, 184, 198)


def _two_blocks(pen: Pen, workflow: Workflow):
    _block(pen, LEFT, UPPER, 170, 96, "T5", GOLD)
    _block(pen, LEFT, UPPER + 114, 170, 96, "Flux")
    _arrow(pen, LEFT + 184, LEFT + 226)
    _scene(pen, scenes.balloon, LEFT + 242, UPPER + 2, 206, 206)


def _two_gpus(pen: Pen, workflow: Workflow):
    for left, title, name, color in ((LEFT + 12, "GPU 0", "Flux", MINT),
                                     (LEFT + 246, "GPU 1", "T5", GOLD)):
        _gpu(pen, left, UPPER + 6, 190, 180, title)
        _block(pen, left + 18, UPPER + 22, 154, 106, name, color)


def _placed(pen: Pen, workflow: Workflow):
    """The weights on the card and those in main memory, of the file's size."""
    on_card = workflow.types("FeatherweightPlaceModel")[0]["widgets_values"][0]
    size = next(float(size.split()[0]) for file, size in workflow.files.items()
                if file.startswith("diffusion_models/"))
    unit = 240 / (size - on_card)
    for top, title, value, color in ((UPPER + 8, "8 GB card", on_card, MINT),
                                     (UPPER + 116, "main memory", size - on_card, PALE)):
        pen.box(LEFT, top, WIDE, 86, DARK, PALE, 4, 12)
        pen.box(LEFT + 12, top + 12, value * unit, 62, color, radius=8)
        pen.label(LEFT + 12 + value * unit / 2, top + 44, f"{value:.1f} GB", 34, BACKGROUND, 0.8)
        pen.text(LEFT + 20 + value * unit, top + 44, title, LABEL)


def _checkpoint(pen: Pen, workflow: Workflow):
    _file(pen, LEFT, UPPER, 196, HEIGHT)
    for row, (name, color) in enumerate((("model", MINT), ("T5", GOLD), ("VAE", PALE))):
        height = (76, 50, 42)[row]
        top = UPPER + 14 + (0, 82, 138)[row]
        pen.box(LEFT + 12, top, 138 if row == 0 else 172, height, BACKGROUND, color, 4, 8)
        pen.label(LEFT + 12 + (138 if row == 0 else 172) / 2, top + height / 2, name, LABEL)
    _arrow(pen, LEFT + 210, LEFT + 248)
    _scene(pen, scenes.house, LEFT + 264, UPPER + 6, 184, 198)


def _low_rank(pen: Pen, left, top):
    """Weights of four bits, and a low-rank part."""
    _block(pen, left, top, 128, 116, "4-bit", MINT)
    _plus(pen, left + 152, top + 58)
    pen.box(left + 176, top, 16, 116, GOLD, radius=5)
    pen.box(left + 200, top, 68, 16, GOLD, radius=5)
    pen.label(left + 236, top + 50, "low", LABEL)
    pen.label(left + 236, top + 82, "rank", LABEL)


def _svdquant(pen: Pen, workflow: Workflow):
    _low_rank(pen, LEFT, UPPER)
    _plus(pen, LEFT + 20, UPPER + 168)
    _lora(pen, LEFT + 52, UPPER + 138, 134, 60)
    _arrow(pen, LEFT + 202, LEFT + 256, UPPER + 168)
    _scene(pen, scenes.robot, LEFT + 284, UPPER + 6, 164, 198, 0.5)


def _saved(pen: Pen, workflow: Workflow):
    _block(pen, LEFT, UPPER, 210, 96, "model", PALE)
    _plus(pen, LEFT + 105, UPPER + 116, 10)
    _lora(pen, LEFT, UPPER + 136, 98, 68)
    _lora(pen, LEFT + 112, UPPER + 136, 98, 68)
    _arrow(pen, LEFT + 226, LEFT + 272)
    _file(pen, LEFT + 288, UPPER, 160, HEIGHT)
    pen.label(LEFT + 368, UPPER + 78, "GGUF", 40, BACKGROUND, 1)
    for row in range(4):
        for column in range(5):
            color = "#2a9d84" if (row + 2 * column) % 3 else "#d59a1f"
            pen.box(LEFT + 306 + column * 26, UPPER + 108 + row * 24, 19, 17, color, radius=3)


def _sound_of_fire(pen: Pen, workflow: Workflow):
    _film(pen, scenes.campfire, LEFT, UPPER, WIDE, HEIGHT, sound=True)


def _first_and_last(pen: Pen, workflow: Workflow):
    _scene(pen, scenes.sunrise, LEFT, UPPER + 4, 112, 112)
    _scene(pen, scenes.sunrise, LEFT + WIDE - 112, UPPER + 4, 112, 112, 1)
    pen.label(LEFT + 56, UPPER + 142, "first", LABEL)
    pen.label(LEFT + WIDE - 56, UPPER + 142, "last", LABEL)
    _film(pen, scenes.sunrise, LEFT + 132, UPPER, WIDE - 264, 150, frames=2)
    for bar in range(34):
        share = (0.25, 0.6, 1, 0.7, 0.35, 0.85, 0.5, 0.2, 0.75)[bar * 4 % 9]
        x, y = LEFT + 7 + bar * 13.2, LOWER - 22
        pen.line((x, y - 20 * share), (x, y + 20 * share), color=MINT, width=6)


def _sdnq(pen: Pen, workflow: Workflow):
    pen.box(LEFT, UPPER, 130, 44, GOLD, radius=10)
    pen.box(LEFT, UPPER + 16, WIDE, HEIGHT - 16, GOLD, radius=12)
    pen.box(LEFT + 14, UPPER + 32, WIDE - 28, HEIGHT - 48, DARK, radius=10)
    _low_rank(pen, LEFT + 90, UPPER + 60)


def _three_encoders(pen: Pen, workflow: Workflow):
    for row, name in enumerate(("CLIP-L", "CLIP-G", "T5")):
        _plain(pen, LEFT, UPPER + 4 + row * 71, 140, 60, name, GOLD)
    _arrow(pen, LEFT + 152, LEFT + 192)
    _scene(pen, scenes.city, LEFT + 208, UPPER + 4, 240, 202)


def _pixels(pen: Pen, workflow: Workflow):
    _scene(pen, scenes.mushroom, LEFT, UPPER + 6, 150, 198)
    for row, name in enumerate(("4 steps", "pixels")):
        _lora(pen, LEFT + 166, UPPER + 20 + row * 66, 116, 54, name)
    _arrow(pen, LEFT + 172, LEFT + 276, UPPER + 178)
    _image(pen, scenes.pixel_art(scenes.mushroom(150 / 198)), LEFT + WIDE - 150, UPPER + 6, 150,
           198)


def _processor(pen: Pen, workflow: Workflow):
    _chip(pen, LEFT + 20, UPPER + 26, 158, "CPU")
    _arrow(pen, LEFT + 206, LEFT + 248)
    _scene(pen, scenes.hills, LEFT + 264, UPPER + 6, 184, 198)


def _module(pen: Pen, workflow: Workflow):
    _image(pen, scenes.robot(1.0, 0.0, False), LEFT, UPPER, 104, 104)
    _block(pen, LEFT + 124, UPPER, 172, 104, "Wan 2.1")
    _plus(pen, LEFT + 314, UPPER + 52)
    _block(pen, LEFT + 334, UPPER, 114, 104, "VACE", GOLD)
    _film(pen, scenes.robot, LEFT, UPPER + 116, WIDE, 94, frames=4)


def _in_turn(pen: Pen, workflow: Workflow):
    _block(pen, LEFT, UPPER, 196, 84, "first steps", MINT, 1)
    _arrow(pen, LEFT + 204, LEFT + 244, UPPER + 42)
    _block(pen, LEFT + 252, UPPER, 196, 84, "last steps", GOLD, 1)
    _film(pen, scenes.rocket, LEFT, UPPER + 98, WIDE, 112, frames=4)


def _from_an_image(pen: Pen, workflow: Workflow):
    _scene(pen, scenes.sea, LEFT, UPPER + 30, 130, 150)
    _arrow(pen, LEFT + 142, LEFT + 182)
    _film(pen, scenes.sea, LEFT + 196, UPPER + 12, WIDE - 196, 186, frames=2)


def _plain_film(pen: Pen, workflow: Workflow):
    _film(pen, scenes.sea, LEFT, UPPER, WIDE, HEIGHT, frames=2)


def _workers(pen: Pen, workflow: Workflow):
    """Images of the workflow, one from each worker."""
    side, space = 101, 12
    shown = scenes.city, scenes.flower, scenes.sea, scenes.balloon
    for number in range(4):
        left = LEFT + number * (side + (WIDE - 4 * side) / 3)
        _plain(pen, left, UPPER + 6, side, 52, f"GPU {number}")
        pen.line((left + side / 2, UPPER + 60), (left + side / 2, UPPER + 82), width=6)
        pen.polygon((left + side / 2 - 13, UPPER + 76), (left + side / 2 + 13, UPPER + 76),
                    (left + side / 2, UPPER + 92))
        _scene(pen, shown[number], left, UPPER + 92 + space, side, side)


def _to_a_size(pen: Pen, workflow: Workflow):
    """The dense model's image and that of the mix, with the types of a few layers."""
    _image(pen, _of_sheet("dense"), LEFT, UPPER + 4, 150, 150)
    _image(pen, _of_sheet("mix"), LEFT + WIDE - 150, UPPER + 4, 150, 150)
    pen.label(LEFT + 75, UPPER + 188, "dense", LABEL)
    pen.label(LEFT + WIDE - 75, UPPER + 188, "mix", LABEL)
    for column, share in enumerate((0.9, 0.35, 0.6, 0.25, 0.75)):
        left, height = LEFT + 170 + column * 22, 120 * share
        pen.box(left, UPPER + 140 - height, 16, height, (MINT, GOLD)[share < 0.5], radius=4)
    _arrow(pen, LEFT + 168, LEFT + 282, UPPER + 174)


def _training(pen: Pen, workflow: Workflow):
    _scene(pen, scenes.house, LEFT, UPPER + 6, 158, 158)
    _lora(pen, LEFT + 172, UPPER + 58, 104, 54)
    _scene(pen, scenes.house, LEFT + WIDE - 158, UPPER + 6, 158, 158, 1)
    pen.label(LEFT + 79, UPPER + 192, "without", LABEL)
    pen.label(LEFT + WIDE - 79, UPPER + 192, "with", LABEL)
    _arrow(pen, LEFT + 172, LEFT + 276, UPPER + 140)


def _usual(pen: Pen, workflow: Workflow):
    """A prompt, a model and an image: of a workflow that has no drawing of its own."""
    pen.box(LEFT, UPPER + 30, 120, 146, None, TEXT, 4, 12)
    for row, share in enumerate((1, 0.8, 1, 0.5)):
        y = UPPER + 62 + row * 28
        pen.line((LEFT + 18, y), (LEFT + 18 + 84 * share, y), width=6)
    _arrow(pen, LEFT + 132, LEFT + 172)
    _scene(pen, scenes.hills, LEFT + 188, UPPER + 6, 260, 198)


DIAGRAMS: dict[str, Diagram] = {
    f"{FIRST} - Z-Image Turbo GGUF": lambda pen, _: _wide(pen, scenes.city),
    "FLUX.2 dev GGUF": lambda pen, _: _wide(pen, scenes.balloon),
    "FLUX.2 klein 4B GGUF with a LoRA check": _outpainting,
    "FLUX.2 klein 9B GGUF": lambda pen, _: _wide(pen, scenes.flower),
    "Flux.1 Kontext GGUF": lambda pen, _: _editing(pen, scenes.house),
    "Flux.1 dev GGUF": _two_blocks,
    "Flux.1 dev GGUF packed to int8": _to_int8,
    "Flux.1 dev GGUF placed on an 8 GB card": _placed,
    "Flux.1 dev GGUF with ControlNet": _control,
    "Flux.1 dev GGUF with T5 on a second GPU": _two_gpus,
    "Flux.1 dev NF4 checkpoint": _checkpoint,
    "Flux.1 dev SVDQuant with a LoRA": _svdquant,
    "Flux.1 dev saved with two LoRAs": _saved,
    "Krea 2 Turbo GGUF": lambda pen, _: _wide(pen, scenes.photo),
    "LTX-2 GGUF video with sound": _sound_of_fire,
    "MiniMax-H3 GGUF video with sound": _first_and_last,
    "Qwen-Image GGUF": lambda pen, _: _wide(pen, scenes.poster),
    "Qwen-Image SDNQ": _sdnq,
    "Qwen-Image-Edit 2511 GGUF with mmproj": _edit_with_eye,
    "SD3.5 Medium GGUF": _three_encoders,
    "SDXL GGUF with two LoRAs": _pixels,
    "Stable Diffusion LCM on a CPU": _processor,
    "Stable Diffusion train a LoRA": _training,
    "Wan 2.1 14B VACE module": _module,
    "Wan 2.2 14B GGUF video in 4 steps": _in_turn,
    "Wan 2.2 5B GGUF video": _plain_film,
    "Wan 2.2 14B GGUF image to video": _from_an_image,
    "Z-Image Turbo on Ray": _workers,
    "Z-Image Turbo packed to a size": _to_a_size,
    "Z-Image Turbo packed to fit your GPU": _fit_cards,
}


def draw_diagram(pen: Pen, workflow: Workflow):
    """Draws what the workflow is for."""
    DIAGRAMS.get(workflow.name, _usual)(pen, workflow)
