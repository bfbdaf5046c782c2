"""python -m devtools.artwork: draws media/icon.png and media/banner.png, a feather made of packed
blocks.

It also cuts docs/images/first_picture.png, the README's screenshot, out of the one that
tests/server/test_browser.py leaves in .dev/screenshots.
"""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from devtools import ROOT

MEDIA = ROOT / "media"
SCREENSHOT = ROOT / ".dev" / "screenshots" / "picture.png"
FIRST_PICTURE = ROOT / "docs" / "images" / "first_picture.png"
WORKFLOW = (404, 80, 1320, 752)  # left, top, right and bottom of the demo's workflow on it
BACKGROUND, QUILL, TEXT, QUIET = "#14181f", "#e8edf2", "#f4f7fa", "#9fb0c0"
# text, top and height in heights of the banner, colour
LINES = (
    ("Featherweight", 0.3, 0.155, TEXT),
    ("GGUF, NF4, SDNQ, Nunchaku, GPTQ, fp8 files", 0.53, 0.062, QUIET),
    ("packed in memory, LoRAs at full strength", 0.62, 0.062, QUIET),
)
TIP, ROOT_COLOUR = np.array([126, 226, 208]), np.array([58, 110, 222])
SMOOTH = 4  # pixels drawn for each pixel kept, along each side
BARBS, BLOCK = 13, 0.043  # on each side of the quill; length of a block in heights of the feather


def icon(size: int = 400) -> Image.Image:
    """A square with rounded corners, transparent outside."""
    image = Image.new("RGBA", (size * SMOOTH, size * SMOOTH))
    canvas = ImageDraw.Draw(image)
    canvas.rounded_rectangle((0, 0, *(side - 1 for side in image.size)), image.width * 0.18,
                             BACKGROUND)
    draw_feather(canvas, image.width * 0.49, image.height * 0.52, image.height * 0.94)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def banner(width: int = 1470, height: int = 630) -> Image.Image:
    """21:9: the feather, the name and what the pack does."""
    image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    unit = image.height
    draw_feather(canvas, unit * 0.5, unit * 0.52, unit * 0.94)
    for line, top, size, colour in LINES:
        canvas.text((unit * 0.95, unit * top), line, colour, ImageFont.load_default(unit * size))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def draw_feather(canvas: ImageDraw.ImageDraw, x: float, y: float, size: float):
    """A feather in a square of side `size` about (x, y), its tip at the upper right."""
    generator = np.random.default_rng(4)

    def place(along: float, across: float) -> np.ndarray:
        """A point of the feather: along the quill from 0 (its end) to 1 (the tip), across it to the
        right."""
        bend = 0.1 * math.sin(math.pi * along) + across
        turned = complex(along - 0.5, -bend) * complex(
            math.cos(math.pi * 0.28), math.sin(math.pi * 0.28)
        )
        return np.array([x + turned.real * size, y - turned.imag * size])

    for barb in range(BARBS):
        start = 0.2 + 0.71 * barb / (BARBS - 1)
        reach = 0.23 * math.sin(math.pi * (0.2 + 0.77 * barb / (BARBS - 1)))
        for side in (-1, 1):
            for block in range(max(1, round(reach * (1 if side < 0 else 0.8) / BLOCK))):
                low, high = 0.012 + block * BLOCK, 0.012 + (block + 0.86) * BLOCK
                corners = [place(start + shift + 0.62 * across, side * across)
                           for shift, across in ((0, low), (0, high), (0.046, high), (0.046, low))]
                shade = 0.72 + generator.integers(0, 4) / 10  # one of four levels, as two bits hold
                colour = (ROOT_COLOUR + (TIP - ROOT_COLOUR) * (barb + block) / (BARBS + 3)) * shade
                canvas.polygon([tuple(corner) for corner in corners],
                               tuple(colour.clip(0, 255).astype(int)))
    quill = [tuple(place(along, 0)) for along in np.linspace(0, 0.98, 60)]
    canvas.line(quill, QUILL, round(size * 0.014), joint="curve")


if __name__ == "__main__":
    MEDIA.mkdir(exist_ok=True)
    icon().save(MEDIA / "icon.png", optimize=True)
    banner().save(MEDIA / "banner.png", optimize=True)
    if SCREENSHOT.is_file():
        picture = Image.open(SCREENSHOT).convert("RGB").crop(WORKFLOW).quantize(128)
        info = PngInfo()  # what the nodes on it show
        info.add_text("Featherweight", SCREENSHOT.with_suffix(".json").read_text(encoding="utf-8"))
        picture.save(FIRST_PICTURE, optimize=True, pnginfo=info)
