"""The pictures of the demo on one labelled sheet."""
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from devtools.files import demo_files

# pixels: a picture, around it, above all, for the text under a picture
SIDE, GAP, TOP, BELOW = 256, 20, 84, 132
COLUMNS = 5
PAPER, INK, FAINT = "#f7f6f2", "#222222", "#555555"
# a page that is 830 pixels wide shows them at 0.6 of their size
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (34, 30, 26))
FACTS = "Featherweight"  # the text in a PNG that says what the sheet shows, as JSON


def sheet(results: dict[str, dict], prompt: str) -> Image.Image:
    """results: as `demo.draw_all` gives them. The dense model with LoRAs is only what the others
    are compared with."""
    shown = {title: result for title, result in results.items() if not title.startswith("dense +")}
    shown = dict(sorted(shown.items(), key=lambda pair: " + " in pair[0]))  # LoRAs last
    rows = -(-(len(shown) + 1) // COLUMNS)
    picture = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), TOP + rows * (SIDE + BELOW)), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 22), f"“{prompt}”", INK, TITLE)
    for index, (title, result) in enumerate(shown.items()):
        left, top = GAP + index % COLUMNS * (SIDE + GAP), TOP + index // COLUMNS * (SIDE + BELOW)
        drawn = Image.fromarray(result["picture"])
        picture.paste(drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + SIDE + 6), title, INK, TEXT)
        for line, text in enumerate(facts(title, result)):
            pen.text((left, top + SIDE + 44 + 32 * line), text, FAINT, SMALL)
    left, top = GAP + (len(shown) % COLUMNS) * (SIDE + GAP), TOP + (rows - 1) * (SIDE + BELOW)
    words = (
        "One model, prompt and seed. MB: the model in memory. dB: how close to dense, with the"
        " same LoRAs; more is closer. The mix was made here, as large as Q4_K."
    )
    for line, text in enumerate(textwrap.wrap(words, 19)):
        pen.text((left, top + 34 * line), text, FAINT, SMALL)
    return picture


def facts(title: str, result: dict) -> list[str]:
    """What stands under a picture."""
    size = f"{result['bytes'] / 1e6:.1f} MB"
    if title == "dense":
        half = 2 * sum(value.numel() for value in demo_files.flux().values())
        other = [] if result["bytes"] == half else [f"{size} in float32"]
        return [f"{half / 1e6:.1f} MB in 16 bits", *other]
    return [size, "equal to dense" if result["dense"] is None else f"{result['dense']:.1f} dB"]


def save(picture: Image.Image, results: dict[str, dict], path: Path):
    """Writes a sheet and, as a text in the PNG, the bytes of each model on it."""
    info = PngInfo()
    info.add_text(FACTS, json.dumps({title: result["bytes"] for title, result in results.items()}))
    picture.save(path, pnginfo=info, optimize=True)
