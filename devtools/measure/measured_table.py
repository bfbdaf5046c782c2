"""Writes the table of speeds measured by people: `python -m devtools.measure.measured_table`.

Each file of docs/measured is one JSON of *Measure Speed (Featherweight)*; the table stands between
two marks in docs/performance.md.
"""
import json
import statistics
from pathlib import Path
from typing import Any

from devtools import ROOT, markdown_table

FOLDER, PAGE = ROOT / "docs" / "measured", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
COLUMNS = [(way, has_loras) for way in ("dense", "exact", "fast") for has_loras in (False, True)]
TITLES = ["device", "model", "latent", "seconds of a step: dense", "with LoRAs", "exact",
          "with LoRAs", "fast", "with LoRAs", "fast from exact", "versions"]


def measured() -> list[dict[str, Any]]:
    """Returns the JSONs, by their files' names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def row(figures: dict[str, Any]) -> list[str]:
    """Returns the cells of one JSON."""
    seconds = {(line["compute"], line["loras"]): line["seconds"] for line in figures["rows"]}
    device, model, difference = figures["device"], figures["model"], figures["difference"]
    formats = " + ".join(name for name, share in model["formats"].items() if share >= 0.02)
    versions = figures["versions"]
    return [
        f"{device['name']}, {device['memory GB']:g} GB",
        f"{model['class']}, {model['values'] / 1e9:.3g} B, {formats}",
        " x ".join(map(str, figures["latent"])),
        *(f"{statistics.median(seconds[column]):.3g}" if seconds.get(column) else ""
          for column in COLUMNS),
        f"{difference['decibels']:.0f} dB" if difference else "",
        f"Featherweight {versions['Featherweight']}, ComfyUI {versions['ComfyUI']},"
        f" torch {versions['torch']}",
    ]


def with_table(page: str) -> str:
    """Returns a page with the table between its marks."""
    before, rest = page.split(BEGIN)
    table = markdown_table(TITLES, map(row, measured()))
    return before + BEGIN + table + END + rest.split(END)[1]


def main(page: Path = PAGE):
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{page}: {len(measured())} measurements")


if __name__ == "__main__":
    main()
