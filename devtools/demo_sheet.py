"""The pictures of the demo on one labelled sheet."""
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from devtools import ROOT
from devtools.files import demo_files

# pixels: a picture, around it, above all, for the text under a picture
SIDE, GAP, TOP, BELOW = 256, 20, 84, 150
COLUMNS = 5
PAPER, INK, FAINT = "#f7f6f2", "#222222", "#555555"
# a page that is 830 pixels wide shows them at 0.6 of their size
TITLE, TEXT, SMALL, TINY = (ImageFont.load_default(size) for size in (34, 30, 26, 20))
# of the text under a picture: where, color, font
LINES = ((6, INK, TEXT), (44, FAINT, SMALL), (76, FAINT, SMALL), (108, FAINT, TINY))
ORIGINAL = "dense"  # the title of the model that the others are compared with
# (dB, words): what a picture that is at least so close to the original's looks like
WORDS = ((50, "hardly a difference"), (40, "very close"), (32, "close"), (0, "less close"))
BITS = 6  # of each color in the PNG, which is half as large as with 8
SHEET = ROOT / "demo_model" / "sheet.png"  # the README's
# Texts in a PNG, as JSON: bytes of each model, and what stands under its picture.
FACTS, TEXTS = "Featherweight", "Featherweight texts"


def sheet(results: dict[str, dict], prompt: str) -> Image.Image:
    """results: as `demo.draw_all` gives them. The dense model with LoRAs is only what the others
    are compared with."""
    shown = dict(sorted(_shown(results).items(), key=lambda pair: " + " in pair[0]))  # LoRAs last
    rows = -(-(len(shown) + 1) // COLUMNS)
    picture = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), TOP + rows * (SIDE + BELOW)), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 22), f"“{prompt}”", INK, TITLE)
    for index, (title, result) in enumerate(shown.items()):
        left, top = GAP + index % COLUMNS * (SIDE + GAP), TOP + index // COLUMNS * (SIDE + BELOW)
        drawn = Image.fromarray(result["picture"])
        picture.paste(drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        for text, line in zip(facts(title, result), LINES):
            pen.text((left, top + SIDE + line[0]), text, *line[1:])
    left, top = GAP + (len(shown) % COLUMNS) * (SIDE + GAP), TOP + (rows - 1) * (SIDE + BELOW)
    words = (
        "One model in several sizes, one prompt and seed. The mix, made here, is as large as Q4_K"
        " and closer to the original. LoRAs keep their effect. dB: more is"
        " closer, with the same LoRAs."
    )
    for line, text in enumerate(textwrap.wrap(words, 19)):
        pen.text((left, top + 34 * line), text, FAINT, SMALL)
    return picture


def _shown(results: dict[str, dict]) -> dict[str, dict]:
    return {title: result for title, result in results.items() if not title.startswith("dense +")}


def facts(title: str, result: dict) -> list[str]:
    """What stands under a picture: its title, the size of the model, how close it is to the
    original with the same LoRAs, in words, and in dB."""
    half = 2 * sum(value.numel() for value in demo_files.flux().values())
    if title == ORIGINAL:
        return ["original", f"{half / 1e6:.1f} MB in 16 bits"]
    size = f"{result['bytes'] / half:.0%} of the size"
    if result["dense"] is None:
        return [title, size, "the same"]
    words = next(words for least, words in WORDS if result["dense"] >= least)
    return [title, size, words, f"{result['dense']:.1f} dB"]


def save(picture: Image.Image, results: dict[str, dict], path: Path):
    """Writes a sheet with its FACTS and TEXTS."""
    info = PngInfo()
    info.add_text(TEXTS, json.dumps({title: facts(title, result)
                                     for title, result in _shown(results).items()}))
    info.add_text(FACTS, json.dumps({title: result["bytes"] for title, result in results.items()}))
    ImageOps.posterize(picture, BITS).save(path, pnginfo=info, optimize=True)
