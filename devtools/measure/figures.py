"""What was measured, as JSON, as tables in Markdown and as a picture.

A row is {variant: {"median", "min", "max"}} in seconds, the first variant being what the others are
compared with, and "by" a text where kernels were asked for; or {name: value}: an int is bytes,
launches if its name says so, or a bool; a float is seconds if its name says so; text is text.
"""
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from devtools.measure.chart import Value, bar_chart

from PIL import Image

from devtools import markdown_table
from featherweight.loaders.lora.block_chart import BACKGROUND, BAD, FAINT, GOOD

COLUMNS, GAP = 2, 16  # of charts in a picture, and pixels between them


class Report:
    """The figures of a run, written anew after each row, so that one that is cut off leaves what it
    had.

    Args:
        folder: for NAME.json, NAME.md and NAME.png.
        name: of the files.
        machine: what it is measured on.
        closing: gives what ends the Markdown.
    """

    def __init__(self, folder: Path, name: str, machine: str = "unknown",
                 closing: Callable[[dict], str] = lambda figures: ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.closing = folder, name, closing
        self.figures: dict = {"machine": machine}

    def begin(self, case: str, about: str):
        print(f"{case}: {about}", flush=True)
        self.figures[case] = {"about": about, "rows": {}, "ended": "cut off"}
        self.write()

    def add(self, case: str, title: str, row: dict):
        print(f"  {title:36s} " + " | ".join(f"{name} {cell}"
                                             for name, cell in cells(row).items()), flush=True)
        self.figures[case]["rows"][title] = row
        self.write()

    def end(self, case: str, how: str = "done"):
        self.figures[case]["ended"] = how
        self.write()

    def run(self, cases: Mapping[str, Callable], names: Iterable[str], options):
        """Measures cases by their names, each of which yields (title, row)."""
        for name in names:
            self.begin(name, " ".join(str(cases[name].__doc__).split()))
            for title, row in cases[name](options):
                self.add(name, title, row)
            self.end(name)

    def write(self):
        for ending, text in ("json", json.dumps(self.figures, indent=1)), ("md", self.text()):
            (self.folder / f"{self.name}.{ending}").write_text(text, encoding="utf-8")

    def draw(self):
        draw(self.figures).save(self.folder / f"{self.name}.png")
        print(f"Done: {self.name}.json, {self.name}.md and {self.name}.png in {self.folder}")

    def text(self) -> str:
        """Every case as tables, rows of the same variants in one."""
        parts = [f"Machine: {self.figures['machine']}. Times are medians (least-most); × is the"
                 " ratio to the first column.\n"]
        for case, found in each_case(self.figures):
            parts.append(f"## {case}\n\n{found['about']}\n")
            tables: dict[tuple, list] = {}
            for title, row in found["rows"].items():
                shown = cells(row)
                tables.setdefault(tuple(shown), []).append([title, *shown.values()])
            parts += [markdown_table(["", *names], rows) for names, rows in tables.items()]
        return "\n".join(filter(None, [*parts, self.closing(self.figures)]))


def each_case(figures: dict) -> list[tuple[str, dict]]:
    return [(case, found) for case, found in figures.items() if isinstance(found, dict)]


def is_timing(row: dict) -> bool:
    return isinstance(next(iter(row.values())), dict)


def ratios(row: dict) -> dict[str, tuple[float, float, float]]:
    """Median, least and most of each variant but the first, over the median of the first."""
    (_, first), *others = row.items()
    return {
        name: tuple(times[key] / first["median"] for key in ("median", "min", "max"))
        for name, times in others
    }


def cells(row: dict) -> dict[str, str]:
    """Variant or name -> what a table shows."""
    if not is_timing(row):
        return {name: quantity(name, value) for name, value in row.items()}
    shown = {name: span(times) for name, times in row.items()}
    for name, (ratio, _, _) in ratios(row).items():
        shown[name] += f", ×{ratio:.2f}"
    return {
        name: ", ".join(filter(None, [cell, row[name].get("by")])) for name, cell in shown.items()
    }


def span(times: dict) -> str:
    """Median and, in brackets, least and most: 1.42 s (1.38-1.60)."""
    scale, unit, digits = (
        (1, "s", 2) if times["median"] >= 1 else (1e3, "ms", 1 if times["median"] >= 0.01 else 3)
    )
    low, median, high = (f"{times[key] * scale:.{digits}f}" for key in ("min", "median", "max"))
    return f"{median} {unit} ({low}-{high})"


def quantity(name: str, value) -> str:
    if isinstance(value, (bool, str)) or name.startswith("launches"):
        return str(value)
    if isinstance(value, int):
        return f"{value / 1e6:.1f} MB"
    if name.endswith("dB"):
        return f"{value:.1f}"
    return f"{value:.1f} s" if name.endswith("seconds") else f"{value:.4f}"


def draw(figures: dict) -> Image.Image:
    """Returns a chart of each case that measures time: how many times as long each variant takes
    as the first of its row."""
    charts = [bar_chart(f"{case}: times the first of each row", groups).image
              for case, found in each_case(figures)
              if (groups := {title: bars(row) for title, row in found["rows"].items()
                             if is_timing(row)})]
    columns: list[list[Image.Image]] = [[] for _ in range(COLUMNS)]
    for chart in charts:
        min(columns, key=height).append(chart)
    width = max((chart.width for chart in charts), default=0)
    picture = Image.new("RGB", (COLUMNS * (width + GAP), max(map(height, columns)) or GAP),
                        BACKGROUND)
    for number, column in enumerate(columns):
        for place, chart in enumerate(column):
            picture.paste(chart, (number * (width + GAP), height(column[:place])))
    return picture


def height(column: list[Image.Image]) -> int:
    return sum(chart.height + GAP for chart in column)


def bars(row: dict) -> list[Value]:
    (first, times), *_ = row.items()
    return [Value(first, 1, span(times), FAINT), *(
        Value(name, ratio, f"{ratio:.2f} ({least:.2f}-{most:.2f})", GOOD if ratio < 1 else BAD)
        for name, (ratio, least, most) in ratios(row).items())]
