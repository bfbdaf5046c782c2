"""The pictures of the demo on one labelled sheet."""
import textwrap

from PIL import Image, ImageDraw, ImageFont

# pixels: a picture, around it, above all, for the text under a picture
SIDE, GAP, TOP, BELOW = 256, 20, 76, 112
COLUMNS = 5
PAPER, INK, FAINT = "#f7f6f2", "#222222", "#666666"
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (24, 21, 17))


def sheet(results: dict[str, dict], prompt: str, about: str) -> Image.Image:
    """results: as `demo.draw_all` gives them. The dense model with LoRAs is only what the others
    are compared with."""
    shown = {title: result for title, result in results.items() if not title.startswith("dense +")}
    shown = dict(sorted(shown.items(), key=lambda pair: " + " in pair[0]))  # LoRAs last
    rows = -(-(len(shown) + 1) // COLUMNS)
    picture = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), TOP + rows * (SIDE + BELOW)), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 24), f"“{prompt}”", INK, TITLE)
    for index, (title, result) in enumerate(shown.items()):
        left, top = GAP + index % COLUMNS * (SIDE + GAP), TOP + index // COLUMNS * (SIDE + BELOW)
        drawn = Image.fromarray(result["picture"])
        picture.paste(drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + SIDE + 8), title, INK, TEXT)
        for line, text in enumerate(facts(title, result)):
            pen.text((left, top + SIDE + 36 + 22 * line), text, FAINT, SMALL)
    left, top = GAP + (len(shown) % COLUMNS) * (SIDE + GAP), TOP + (rows - 1) * (SIDE + BELOW)
    words = (
        "The same model, prompt and seed each time; only the packing of the weights differs."
        " Differences are peak signal-to-noise ratios against the dense model with the same LoRAs:"
        " more is closer. The mix of types was made here, to the size of Q4_K's file."
    )
    for line, text in enumerate([*textwrap.wrap(words, 30), "", *textwrap.wrap(about, 30)]):
        pen.text((left, top + 24 * line), text, FAINT, SMALL)
    return picture


def facts(title: str, result: dict) -> list[str]:
    """What stands under a picture."""
    held = f"{result['bytes'] / 1e6:.1f} MB held, {result['seconds']:.2f} s"
    if title == "dense":
        return [held, "the reference"]
    return [
        held,
        "equal to dense" if result["dense"] is None else f"difference {result['dense']:.1f} dB"
    ]
