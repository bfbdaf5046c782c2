"""Small scenes that stand for what a model generates: drawn, not generated."""
import math
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from devtools.artwork import draw_feather

SIDE = 400  # pixels of the height of a scene
PIXEL_ART = 20  # pixels of it in pixel art


class Canvas:
    """Draws in shares of the height; `wide` is the width in them."""

    def __init__(self, wide: float, top: str, bottom: str):
        self.wide, size = wide, (round(wide * SIDE), SIDE)
        shade = Image.linear_gradient("L").resize(size)
        self.image = Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top),
                                     shade)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, fill, *points):
        self.draw.polygon([(x * SIDE, y * SIDE) for x, y in points], fill)

    def circle(self, fill, x, y, radius, height=None):
        height = height or radius
        self.draw.ellipse([value * SIDE for value in (x - radius, y - height, x + radius,
                                                      y + height)], fill)

    def box(self, fill, left, top, width, height, radius=0.0):
        self.draw.rounded_rectangle([value * SIDE for value in (left, top, left + width,
                                                                top + height)],
                                    radius * SIDE, fill)

    def line(self, fill, width, *points):
        self.draw.line([(x * SIDE, y * SIDE) for x, y in points], fill, round(width * SIDE),
                       joint="curve")

    def text(self, fill, x, y, text, size):
        self.draw.text((x * SIDE, y * SIDE), text, fill, ImageFont.load_default(size * SIDE), "mm",
                       stroke_width=size * SIDE * 0.03)


def hills(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#8ec9ef", "#f3e3c3")
    canvas.circle("#ffd75e", wide * 0.72, 0.28, 0.12)
    canvas.polygon("#5b7d99", (0, 0.8), (wide * 0.3, 0.25), (wide * 0.62, 0.8))
    canvas.polygon("#f4f8fb", (wide * 0.225, 0.386), (wide * 0.3, 0.25), (wide * 0.379, 0.386),
                   (wide * 0.33, 0.36), (wide * 0.29, 0.41))
    canvas.polygon("#41627c", (wide * 0.35, 0.85), (wide * 0.7, 0.42), (wide * 1.1, 0.85))
    canvas.circle("#6aa14f", wide * 0.2, 1.25, wide * 0.6, 0.55)
    canvas.circle("#4f8a3f", wide * 0.9, 1.3, wide * 0.6, 0.55)
    return canvas.image


def flower(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#173a30", "#2d6b4f")
    for x, y, size in ((0.5, 0.45, 1.0), (0.16, 0.62, 0.55), (0.85, 0.58, 0.65)):
        x *= wide
        canvas.line("#5fae5a", 0.03 * size, (x, y), (x + 0.03, 1.05))
        for petal in range(8):
            angle = petal * math.tau / 8
            canvas.circle(("#f19ac2", "#e66fa8")[petal % 2], x + math.cos(angle) * 0.16 * size,
                          y + math.sin(angle) * 0.16 * size, 0.105 * size)
        canvas.circle("#ffd75e", x, y, 0.1 * size)
        canvas.circle("#e0a92e", x, y, 0.05 * size)
    return canvas.image


def photo(wide: float, time: float = 0.0) -> Image.Image:
    """Window light, a background out of focus, and a feather."""
    canvas = Canvas(wide, "#c98d52", "#3a2118")
    for x, y, radius, fill in ((0.1, 0.2, 0.16, "#f5cf93"), (0.3, 0.1, 0.1, "#e9b676"),
                               (0.86, 0.3, 0.14, "#a4673c"), (0.7, 0.12, 0.09, "#d99d5e"),
                               (0.95, 0.65, 0.1, "#7c4a2c"), (0.05, 0.6, 0.12, "#b77a47")):
        canvas.circle(fill, x * wide, y, radius)
    canvas.box("#2a1710", 0, 0.84, wide, 0.2)
    canvas.image = canvas.image.filter(ImageFilter.GaussianBlur(SIDE * 0.03))
    draw_feather(ImageDraw.Draw(canvas.image), wide * 0.5 * SIDE, 0.5 * SIDE, 0.92 * SIDE)
    return canvas.image


def poster(wide: float, time: float = 0.0) -> Image.Image:
    """A shop window with writing."""
    canvas = Canvas(wide, "#f6e7cf", "#f0d6b0")
    for stripe in range(12):
        left = stripe * wide / 12
        fill = ("#c8452f", "#fbf4e6")[stripe % 2]
        canvas.box(fill, left, 0, wide / 12, 0.2)
        canvas.circle(fill, left + wide / 24, 0.2, wide / 24, 0.06)
    canvas.text("#2c3e63", wide / 2, 0.47, "FRESH BREAD", min(0.27, wide * 0.125))
    canvas.text("#c8452f", wide / 2, 0.72, "every day from 7", min(0.17, wide * 0.09))
    canvas.line("#2c3e63", 0.02, (wide * 0.2, 0.88), (wide * 0.8, 0.88))
    return canvas.image


def city(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#1d2350", "#e57a5c")
    canvas.circle("#ffe9b0", wide * 0.8, 0.3, 0.1)
    heights = (0.45, 0.7, 0.55, 0.85, 0.6, 0.4, 0.75, 0.5, 0.65)
    width = wide / len(heights)
    for number, height in enumerate(heights):
        canvas.box("#151a38", number * width, 1 - height, width * 0.92, height)
        for row in range(int(height / 0.11)):
            for column in range(2):
                if (number * 7 + row * 3 + column * 5) % 4:
                    canvas.box("#ffcf70", number * width + width * (0.16 + 0.38 * column),
                               1 - height + 0.05 + row * 0.11, width * 0.2, 0.05)
    return canvas.image


def house(wide: float, time: float = 0.0) -> Image.Image:
    """In summer, and at time 1 in snow."""
    winter = time > 0.5
    canvas = Canvas(wide, *(("#6f8db0", "#b9cbdc") if winter else ("#86c5ee", "#dff0f7")))
    canvas.circle("#eef4f8" if winter else "#63a04c", wide / 2, 1.3, wide, 0.6)
    left = wide / 2 - 0.3
    canvas.box("#8d5b43", left + 0.42, 0.18, 0.09, 0.25)
    canvas.box("#c4553f", left, 0.46, 0.6, 0.4)
    canvas.polygon("#f7fbfe" if winter else "#5d3a35", (left - 0.08, 0.48), (left + 0.3, 0.16),
                   (left + 0.68, 0.48))
    canvas.box("#4a2c25", left + 0.23, 0.62, 0.14, 0.24)
    for x in (0.06, 0.43):
        canvas.box("#ffd97a" if winter else "#cfe9f7", left + x, 0.55, 0.12, 0.13)
    for flake in range(26 if winter else 0):
        canvas.circle("#ffffff", (flake * 0.618) % 1 * wide, (flake * 0.271) % 1, 0.015)
    return canvas.image


def apple(wide: float, time: float = 0.0) -> Image.Image:
    """Red, and at time 1 green."""
    canvas = Canvas(wide, "#f3e8d7", "#d9c2a0")
    canvas.circle("#b89f7c", wide / 2, 0.86, 0.32, 0.06)
    body, light = ("#5c9b3b", "#8cc463") if time > 0.5 else ("#c2342c", "#e8695a")
    for x in (-0.1, 0.1):
        canvas.circle(body, wide / 2 + x, 0.58, 0.22, 0.26)
    canvas.circle(light, wide / 2 - 0.14, 0.5, 0.06, 0.09)
    canvas.line("#5a3a22", 0.03, (wide / 2, 0.4), (wide / 2 + 0.05, 0.2))
    canvas.circle("#4c8b3b", wide / 2 + 0.15, 0.26, 0.1, 0.045)
    return canvas.image


def mushroom(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#6fc3e8", "#bfe6f2")
    canvas.box("#5da348", 0, 0.82, wide, 0.2)
    canvas.box("#f2e3c6", wide / 2 - 0.12, 0.5, 0.24, 0.36, 0.08)
    canvas.draw.pieslice([(wide / 2 - 0.36) * SIDE, 0.14 * SIDE, (wide / 2 + 0.36) * SIDE,
                          0.98 * SIDE], 180, 360, "#d8392f")
    for x, y, radius in ((-0.18, 0.4, 0.06), (0.02, 0.28, 0.07), (0.2, 0.42, 0.06)):
        canvas.circle("#fff4e6", wide / 2 + x, y, radius)
    for x in (-0.05, 0.05):
        canvas.circle("#33261e", wide / 2 + x, 0.64, 0.022, 0.035)
    return canvas.image


def sea(wide: float, time: float = 0.0) -> Image.Image:
    """A boat that sails to the right."""
    canvas = Canvas(wide, "#7cc4ea", "#fbe3bf")
    canvas.circle("#ffcf5c", wide * 0.8, 0.24, 0.1)
    x, y = wide * (0.3 + 0.4 * time), 0.6 + 0.03 * math.sin(time * 5)
    canvas.polygon("#fdf8ee", (x, y - 0.42), (x, y - 0.06), (x + 0.22, y - 0.06))
    canvas.polygon("#e7553f", (x - 0.03, y - 0.34), (x - 0.03, y - 0.06), (x - 0.18, y - 0.06))
    canvas.polygon("#6a3f2b", (x - 0.24, y), (x + 0.26, y), (x + 0.17, y + 0.13),
                   (x - 0.16, y + 0.13))
    for row, fill in enumerate(("#3d8fc0", "#2f79ab", "#235f8c")):
        points = [(step * wide / 40, 0.7 + row * 0.1 + 0.025 * math.sin(
            step * 0.8 + row * 2 + time * 3)) for step in range(41)]
        canvas.polygon(fill, *points, (wide, 1), (0, 1))
    return canvas.image


def rocket(wide: float, time: float = 0.0) -> Image.Image:
    """A rocket that rises."""
    canvas = Canvas(wide, "#10163a", "#5b3f86")
    for star in range(22):
        canvas.circle("#f6f3d8", (star * 0.397) % wide, (star * 0.283) % 0.8, 0.009)
    x, y = wide * (0.35 + 0.25 * time), 0.62 - 0.3 * time
    canvas.polygon("#ff9d3c", (x - 0.06, y + 0.2), (x + 0.06, y + 0.2), (x, y + 0.42))
    canvas.polygon("#ffe07a", (x - 0.03, y + 0.2), (x + 0.03, y + 0.2), (x, y + 0.32))
    canvas.polygon("#d8453b", (x - 0.16, y + 0.22), (x - 0.08, y), (x + 0.08, y),
                   (x + 0.16, y + 0.22))
    canvas.circle("#eef1f6", x, y, 0.1, 0.26)
    canvas.circle("#3b7fb8", x, y - 0.06, 0.05)
    canvas.circle("#3c2c58", wide / 2, 1.12, wide * 0.7, 0.18)
    return canvas.image


def campfire(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#0f1530", "#2b2348")
    for star in range(14):
        canvas.circle("#f6f3d8", (star * 0.397) % wide, (star * 0.183) % 0.5, 0.01)
    for tree in (0.12, 0.3, 0.72, 0.9):
        canvas.polygon("#16263a", (wide * tree - 0.16, 0.84), (wide * tree, 0.3),
                       (wide * tree + 0.16, 0.84))
    canvas.box("#241b22", 0, 0.82, wide, 0.2)
    x, lean = wide / 2, 0.06 * math.sin(time * 4)
    canvas.polygon("#f2622c", (x - 0.2, 0.84), (x - 0.12, 0.5), (x - 0.05, 0.62),
                   (x + lean, 0.34), (x + 0.08, 0.6), (x + 0.14, 0.52), (x + 0.2, 0.84))
    canvas.polygon("#ffc44a", (x - 0.11, 0.84), (x + lean * 0.7, 0.52), (x + 0.11, 0.84))
    canvas.line("#6b4129", 0.06, (x - 0.26, 0.92), (x + 0.24, 0.82))
    canvas.line("#7b4c30", 0.06, (x + 0.26, 0.92), (x - 0.24, 0.82))
    return canvas.image


def sunrise(wide: float, time: float = 0.0) -> Image.Image:
    """Day, and at time 1 evening."""
    sky = (("#79bdf0", "#f7e9cf"), ("#6d4f93", "#f28a4f"), ("#1c1d4d", "#c8524d"))[
        round(time * 2)]
    canvas = Canvas(wide, *sky)
    canvas.circle("#ffd75e", wide * (0.25 + 0.5 * time), 0.26 + 0.36 * time, 0.14)
    canvas.polygon("#2d4a5e", (0, 0.78), (wide * 0.25, 0.55), (wide * 0.5, 0.78),
                   (wide * 0.75, 0.5), (wide, 0.78), (wide, 1), (0, 1))
    canvas.box("#1d3344", 0, 0.86, wide, 0.2)
    return canvas.image


def robot(wide: float, time: float = 0.0, walks: bool = True) -> Image.Image:
    """A figure that walks to the right, and alone on white."""
    canvas = Canvas(wide, *(("#8fd0d8", "#e9e2c2") if walks else ("#f4f4f1", "#dedfe0")))
    x, scale = (wide * (0.28 + 0.44 * time), 0.8) if walks else (wide / 2, 1.0)
    if walks:
        canvas.box("#8aa35a", 0, 0.86, wide, 0.2)

    def box(fill, left, top, width, height, radius=0.0):
        canvas.box(fill, x + left * scale, 0.9 + (top - 0.9) * scale, width * scale,
                   height * scale, radius * scale)

    step = 0.06 * math.sin(time * 9)
    box("#3f5a78", -0.13, 0.76, 0.09, 0.14 + step, 0.02)
    box("#3f5a78", 0.04, 0.76, 0.09, 0.14 - step, 0.02)
    box("#e2873b", -0.19, 0.42, 0.38, 0.36, 0.06)
    box("#f6f3e8", -0.1, 0.52, 0.2, 0.14, 0.02)
    box("#5679a0", -0.16, 0.14, 0.32, 0.25, 0.06)
    for eye in (-0.09, 0.03):
        box("#ffe27a", eye, 0.22, 0.06, 0.07, 0.03)
    box("#5679a0", -0.015, 0.05, 0.03, 0.1)
    box("#d8453b", -0.035, 0.02, 0.07, 0.06, 0.03)
    return canvas.image


def balloon(wide: float, time: float = 0.0) -> Image.Image:
    canvas = Canvas(wide, "#4f8fd6", "#fbd9b5")
    for x, y in ((0.15, 0.3), (0.8, 0.22), (0.7, 0.75)):
        for shift, radius in ((-0.09, 0.06), (0, 0.09), (0.1, 0.06)):
            canvas.circle("#fbfcfd", x * wide + shift, y, radius, radius * 0.7)
    x = wide / 2
    canvas.circle("#d8453b", x, 0.38, 0.29)
    canvas.circle("#f4c04a", x, 0.38, 0.18, 0.29)
    canvas.circle("#d8453b", x, 0.38, 0.07, 0.29)
    canvas.polygon("#b63a31", (x - 0.2, 0.58), (x + 0.2, 0.58), (x + 0.07, 0.74), (x - 0.07, 0.74))
    canvas.box("#7a4e2e", x - 0.07, 0.78, 0.14, 0.12, 0.02)
    for side in (-0.06, 0.06):
        canvas.line("#5a3a22", 0.012, (x + side, 0.73), (x + side, 0.79))
    return canvas.image


def outlines(image: Image.Image) -> Image.Image:
    """White lines on black, as ComfyUI's node for outlines gives."""
    edges = image.convert("L").filter(ImageFilter.GaussianBlur(1)).filter(ImageFilter.FIND_EDGES)
    edges = edges.point([0] * 15 + [255] * 241).filter(ImageFilter.MaxFilter(5))
    inside = Image.new("L", image.size, 0)
    border = SIDE // 50
    inside.paste(edges.crop((border, border, image.width - border, image.height - border)),
                 (border, border))
    return Image.composite(Image.new("RGB", image.size, "#f4f7fa"),
                           Image.new("RGB", image.size, "#05070a"), inside)


def pixel_art(image: Image.Image) -> Image.Image:
    small = image.resize((round(PIXEL_ART * image.width / image.height), PIXEL_ART),
                         Image.Resampling.BOX)
    return small.quantize(12).convert("RGB").resize(image.size, Image.Resampling.NEAREST)


Scene = Callable[..., Image.Image]
