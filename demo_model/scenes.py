"""The pictures that the model learns: a house by a tree, drawn by code from a caption's six
choices.

Every picture is new: sizes, places and hills vary. Nothing is downloaded.
"""
import functools
import itertools
import math
import random
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels, both ways
FINER = 4  # drawn this many times larger, then reduced: smooth edges
HELD_OUT = 256  # combinations that no training picture shows

WALLS = {
    "red": (205, 48, 45), "yellow": (247, 202, 62), "blue": (45, 88, 200), "purple": (132, 68, 172),
    "pink": (244, 132, 172), "white": (244, 242, 238)
}
SIDES = ("left", "right")
TREES = ("pine", "oak", "palm")
GROUNDS = {"grass": (112, 178, 76), "snow": (236, 242, 250), "sand": (232, 200, 138)}
# hour -> colour of the sky at the top and at the horizon, and what the light does to every other
# colour
HOURS = {"noon": ((84, 165, 235), (186, 226, 248), (1.0, 1.0, 1.0)),
         "dusk": ((226, 98, 82), (253, 190, 112), (1.0, 0.82, 0.76)),
         "dawn": ((232, 146, 190), (253, 216, 206), (1.0, 0.92, 0.96)),
         "night": ((32, 44, 104), (70, 88, 160), (0.58, 0.62, 0.82))}
BODIES = ("sun", "moon", "cloud", "rainbow")
FOLIAGE = {"pine": (28, 112, 78), "oak": (84, 152, 48), "palm": (44, 158, 84)}
TRUNK, CHIMNEY, ROOF, DOOR = (124, 80, 52), (150, 84, 70), (86, 74, 84), (104, 66, 48)
# Whatever the hour
RAINBOW = ((228, 60, 60), (250, 200, 60), (64, 196, 190), (70, 90, 210))
GLASS, GLOW = (170, 214, 236), (255, 226, 110)  # windows by day and by night
HORIZON = 88


@dataclass(frozen=True)
class Scene:
    """The choices of one caption; each field's values are in `CHOICES`."""

    wall: str
    side: str
    tree: str
    ground: str
    hour: str
    body: str

    def caption(self) -> str:
        return f"a {self.wall} house {', '.join(self.phrases())}".replace(",", "")

    def phrases(self) -> list[str]:
        """What stands in a caption after the house."""
        article = "an" if self.tree == "oak" else "a"
        return [
            f"{self.side} of {article} {self.tree} tree", f"on {self.ground}", f"at {self.hour}",
            f"under a {self.body}"
        ]


CHOICES = dict(
    zip((field.name for field in fields(Scene)),
        (tuple(WALLS), SIDES, TREES, tuple(GROUNDS), tuple(HOURS), BODIES)))
# no word has two meanings
WORDS = {word: name for name, words in CHOICES.items() for word in words}


def all_scenes() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train with, and the held-out ones. Always the same, and every pair of choices is
    among the first."""
    scenes = [Scene(*choice) for choice in itertools.product(*CHOICES.values())]
    random.Random(0).shuffle(scenes)
    return scenes[HELD_OUT:], scenes[:HELD_OUT]


def asked_for(prompt: str) -> dict[str, str]:
    """The choices that a prompt makes, field -> value; the first word wins where two answer one
    question."""
    found = {}
    for word in prompt.lower().replace(",", " ").replace(".", " ").split():
        if word in WORDS:
            found.setdefault(WORDS[word], word)
    return found


@functools.lru_cache
def sky(hour: str) -> Image.Image:
    top, horizon, _ = HOURS[hour]
    ramp = np.concatenate([
        np.linspace(top, horizon, HORIZON * FINER),
        np.tile(horizon, ((SIZE - HORIZON) * FINER, 1))
    ])
    return Image.fromarray(np.repeat(ramp[:, None], SIZE * FINER, 1).round().astype(np.uint8))


class Canvas:
    """Draws in picture coordinates, under the light of an hour."""

    def __init__(self, hour: str):
        self.hour = hour
        self.image = sky(hour).copy()
        self.draw = ImageDraw.Draw(self.image)

    def lit(self, colour: tuple) -> tuple:
        return tuple(round(value * light) for value, light in zip(colour, HOURS[self.hour][2]))

    def polygon(self, points, colour, lit: bool = True):
        points = [(x * FINER, y * FINER) for x, y in points]
        self.draw.polygon(points, fill=self.lit(colour) if lit else colour)

    def box(self, left, top, right, bottom, colour, **options):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour,
                     **options)

    def ellipse(self, x, y, across, down, colour, **options):
        turns = [math.tau * i / 48 for i in range(48)]
        self.polygon([(x + across * math.cos(t), y + down * math.sin(t)) for t in turns], colour,
                     **options)

    def union(self, circles, colour):
        """Circles (x, y, radius) as one shape."""
        for x, y, radius in circles:
            self.ellipse(x, y, radius, radius, colour)

    def picture(self) -> np.ndarray:
        return np.asarray(self.image.reduce(FINER))


def draw(scene: Scene, chance: random.Random) -> np.ndarray:
    """A picture of the scene, uint8 (SIZE, SIZE, 3)."""
    canvas = Canvas(scene.hour)

    def vary(middle: float, by: float) -> float:
        return middle + chance.uniform(-by, by)

    _body(canvas, scene.body, vary)
    ground = GROUNDS[scene.ground]
    far = tuple(round(0.72 * near + 0.28 * sky) for near, sky in zip(ground, HOURS["noon"][1]))
    for colour, height, steepness in ((far, HORIZON - 2, 4), (ground, HORIZON + 8, 2.5)):
        phase, waves = vary(0, math.pi), vary(0.055, 0.012)
        ridge = [
            (x, height + steepness * math.sin(phase + waves * x)) for x in range(-4, SIZE + 5, 4)
        ]
        canvas.polygon([*ridge, (SIZE + 4, SIZE + 4), (-4, SIZE + 4)], colour)
    house, tree = (37, 97) if scene.side == "left" else (91, 31)
    _tree(canvas, scene.tree, vary(tree, 3), vary(104, 2), vary(1.14, 0.05))
    _house(canvas, WALLS[scene.wall], scene.hour, vary(house, 3), vary(104, 2), vary(1.14, 0.05))
    return canvas.picture()


def _body(canvas: Canvas, body: str, vary):
    x, y, size = vary(64, 6), vary(21, 1.5), vary(1.2, 0.04)
    if body == "sun":
        canvas.ellipse(x, y, 12 * size, 12 * size, (255, 222, 60), lit=False)
    elif body == "moon":
        turns = [math.pi * (i / 24 - 0.5) for i in range(25)]
        outer = [(x + 14 * size * math.cos(t), y + 13 * size * math.sin(t)) for t in turns]
        inner = [(x + 1 * size * math.cos(t), y + 13 * size * math.sin(t)) for t in reversed(turns)]
        canvas.polygon(outer + inner, (255, 250, 222), lit=False)
    elif body == "cloud":
        circles = [(-16, 4, 8), (-6, -3, 11), (7, -1, 10), (17, 4, 8), (0, 4, 8)]
        canvas.union([(x + size * across, y + size * down, size * radius)
                      for across, down, radius in circles], (255, 255, 255))
    else:
        x, radius = vary(64, 5), vary(68, 1.5)
        for band, colour in enumerate(RAINBOW):
            canvas.ellipse(x, 84, radius - 5 * band, radius - 5 * band, colour, lit=False)
        ends = [(x - radius + 20) * FINER, (104 - radius) * FINER, (x + radius - 20) * FINER,
                (64 + radius) * FINER]
        inside = Image.new("L", canvas.image.size)
        ImageDraw.Draw(inside).ellipse(ends, fill=255)
        canvas.image.paste(sky(canvas.hour), mask=inside)


def _tree(canvas: Canvas, kind: str, x: float, base: float, size: float):
    foliage = FOLIAGE[kind]
    if kind == "pine":
        canvas.box(x - 3 * size, base - 10 * size, x + 3 * size, base, TRUNK)
        for bottom, width, height in ((8, 18, 22), (22, 14, 20), (35, 10, 20)):
            canvas.polygon([(x - width * size, base - bottom * size),
                            (x, base - (bottom + height) * size),
                            (x + width * size, base - bottom * size)], foliage)
    elif kind == "oak":
        canvas.polygon([(x - 4 * size, base), (x - 3 * size, base - 26 * size),
                        (x + 3 * size, base - 26 * size), (x + 4 * size, base)], TRUNK)
        circles = [(-9, -27, 10), (9, -27, 10), (-6, -40, 11), (6, -40, 11), (0, -33, 12)]
        canvas.union([(x + size * across, base + size * up, size * radius)
                      for across, up, radius in circles], foliage)
    else:
        canvas.polygon([(x - 3 * size, base), (x - 1 * size, base - 44 * size),
                        (x + 3 * size, base - 44 * size), (x + 3 * size, base)], TRUNK)
        for turn in (-165, -120, -60, -15, 20, 160):
            _leaf(canvas, x + size, base - 44 * size, math.radians(turn), 20 * size, foliage)


def _leaf(canvas: Canvas, x: float, y: float, turn: float, length: float, colour: tuple):
    """A palm leaf: it leaves the crown in the direction `turn` and bends down."""
    ahead, steps = (math.cos(turn), math.sin(turn)), [i / 8 for i in range(9)]
    spine = [(x + ahead[0] * length * s, y + ahead[1] * length * s * 0.8 + 9 * s * s) for s in steps
             ]
    width = [3.6 * math.sin(math.pi * min(1, 0.12 + 0.88 * s)) for s in steps]
    upper = [(px, py - w) for (px, py), w in zip(spine, width)]
    lower = [(px, py + w) for (px, py), w in zip(spine, width)]
    canvas.polygon(upper + lower[::-1], colour)


def _house(canvas: Canvas, wall: tuple, hour: str, x: float, base: float, size: float):
    half, high = 20 * size, 30 * size
    canvas.box(x + 8 * size, base - high - 19 * size, x + 14 * size, base - high - 2 * size,
               CHIMNEY)
    canvas.box(x - half, base - high, x + half, base, wall)
    canvas.polygon([(x - half - 5 * size, base - high), (x, base - high - 20 * size),
                    (x + half + 5 * size, base - high)], ROOF)
    canvas.box(x - 5 * size, base - 17 * size, x + 5 * size, base, DOOR)
    dark = hour in ("night", "dusk")
    for side in (-1, 1):
        middle = x + side * 12.5 * size
        canvas.box(middle - 4 * size, base - 23 * size, middle + 4 * size, base - 13 * size,
                   GLOW if dark else GLASS, lit=not dark)
