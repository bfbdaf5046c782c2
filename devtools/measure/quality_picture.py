"""The figures of `dev.py quality` as a picture: a row for each format, a column of bars for each
figure."""
from PIL import Image, ImageDraw, ImageFont

# pixels: the first column, the others, a row, above them, around all
NAMES, COLUMN, LINE, TOP, MARGIN = 120, 250, 30, 96, 20
BAR = 130
PAPER, INK, FAINT, FILL = "#f7f6f2", "#222222", "#777777", "#2a9d8f"
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (18, 15, 13))


def draw(results: dict[str, dict], about: str) -> Image.Image:
    """results: as `quality.measure` gives them."""
    columns = {
        "held, MB": lambda row: row["bytes"] / 1e6,
        "latent SNR, dB": lambda row: row.get("snr"),
        "all as asked, %": lambda row: 100 * row["accuracy"]["all"],
        "LoRA ink kept, %": lambda row: 100 * row["kept_ink"],
        "LoRA pumpkins kept, %": lambda row: 100 * row["kept_pumpkins"],
    }
    size = (2 * MARGIN + NAMES + len(columns) * COLUMN, TOP + len(results) * LINE + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), about, FAINT, SMALL)
    for line, name in enumerate(results):
        pen.text((MARGIN, TOP + line * LINE), "dense" if name == "F16" else name, INK, TEXT)
    for index, (title, value_of) in enumerate(columns.items()):
        left = MARGIN + NAMES + index * COLUMN
        pen.text((left, TOP - 34), title, INK, TITLE)
        values = [value_of(row) for row in results.values()]
        largest = max(value for value in values if value is not None)
        for line, value in enumerate(values):
            top = TOP + line * LINE
            if value is not None:
                length = max(1, round(BAR * max(0, value) / largest))
                pen.rectangle((left, top + 2, left + length, top + LINE - 12), FILL)
                pen.text((left + length + 8, top), f"{value:.1f}", INK, TEXT)
    return picture
