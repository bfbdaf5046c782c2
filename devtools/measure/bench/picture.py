"""The ratios of a run as a picture: bars from the line at 1, to the left what is faster than the
first variant of its row."""
import math

from devtools.measure.bench.table import is_timing, ratios, span

from PIL import Image, ImageDraw, ImageFont

# pixels: a panel, inside it, between panels, from bar to bar, row to row
WIDTH, MARGIN, GAP, LINE, SPACE = 640, 24, 20, 22, 8
NAMES = 210  # where bars begin, and what comes before them
VALUES = 150  # kept free on the right
COLUMNS = 2
PAPER, PANEL, INK, FAINT, FASTER, SLOWER = (
    "#f4f4f2",
    "#ffffff",
    "#222222",
    "#8a8a8a",
    "#2a9d8f",
    "#d9773f",
)
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (19, 15, 13))


def draw(figures: dict) -> Image.Image:
    panels = [panel(title, rows) for title, rows in each_panel(figures)]
    columns: list[list[Image.Image]] = [[] for _ in range(min(COLUMNS, max(1, len(panels))))]
    for image in panels:
        min(columns, key=height).append(image)
    header = 92
    size = (GAP + len(columns) * (WIDTH + GAP), header + max(map(height, columns)))
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 20),
             "Time relative to the first variant of each row (grey): left of 1 is faster", INK,
             TITLE)
    pen.text((GAP, 52), f"{figures['machine']}. Medians; thin lines go from the least to the most.",
             FAINT, TEXT)
    for index, column in enumerate(columns):
        top = header
        for image in column:
            picture.paste(image, (GAP + index * (WIDTH + GAP), top))
            top += image.height + GAP
    return picture


def height(column: list[Image.Image]) -> int:
    return sum(image.height + GAP for image in column)


def each_panel(figures: dict):
    """(title, {row: variants}) of the cases that measure time; rows of the same shape and dtype
    have a panel of their own."""
    panels: dict[str, dict] = {}
    for case, found in figures.items():
        for title, row in found["rows"].items() if isinstance(found, dict) else ():
            if is_timing(row):
                group, _, rest = title.rpartition(", M = ")
                panels.setdefault(f"{case}: {group}" if group else case,
                                  {})[f"M = {rest}" if group else title] = row
    return panels.items()


def panel(title: str, rows: dict) -> Image.Image:
    """One box: a grey line for each row with its first variant, and a bar for each other
    variant."""
    found = {name: ratios(row) for name, row in rows.items()}
    every = [value for row in found.values() for bounds in row.values() for value in bounds]
    low, high = math.log(min([0.8, *every])), math.log(max([1.25, *every]))
    count = sum(1 + len(row) for row in found.values())
    image = Image.new("RGB", (WIDTH, 64 + LINE * count + SPACE * len(rows)), PANEL)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 16), title, INK, TITLE)

    def x(ratio: float) -> float:
        return NAMES + (math.log(ratio) - low) / (high - low) * (WIDTH - VALUES - NAMES)

    top = 54
    for name, row in rows.items():
        first = next(iter(row))
        pen.text((MARGIN, top), f"{name}: {first} {span(row[first])}", FAINT, SMALL)
        top += LINE
        pen.line((x(1), top, x(1), top + LINE * len(found[name])), FAINT)
        for variant, (ratio, least, most) in found[name].items():
            pen.text((NAMES - 10, top + LINE // 2), variant, INK, TEXT, anchor="rm")
            pen.rectangle((min(x(1), x(ratio)), top + 4, max(x(1), x(ratio)), top + LINE - 5),
                          FASTER if ratio < 1 else SLOWER)
            pen.line((x(least), top + LINE // 2, x(most), top + LINE // 2), INK)
            pen.text((max(x(1), x(most)) + 8, top + LINE // 2), f"{ratio:.2f}", INK, TEXT,
                     anchor="lm")
            top += LINE
        top += SPACE
    return image
