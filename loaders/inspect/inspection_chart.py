"""Draws an inspection as a chart: a bar for each block, as long as its bytes, coloured by type."""
import textwrap

import torch

from ..byte_sizes import size_text
from ..lora.block_chart import (
    BAD,
    BODY,
    FAINT,
    GOOD,
    HEADING_LENGTH,
    MARGIN,
    ROW,
    SMALL,
    TEXT,
    WIDTH,
    Bar,
    Chart,
    Color,
    font,
)
from .identify import Inspection
from .inspection_text import block_errors, cards_notes, cards_title, error_text

LABELS, VALUES = 230, 150
BAR_WIDTH = WIDTH - 2 * MARGIN - LABELS - VALUES
MAX_ROWS = 110
LABEL_LENGTH = 30  # characters of a block's name that fit
# From few bits (red) to many (blue); unpacked types are grey, the wider the lighter.
COLORS = {
    "Q2_K": (214, 69, 65), "Q3_K": (238, 122, 72), "IQ4_XS": (246, 180, 82),
    "IQ4_NL": (214, 150, 60), "Q4_K": (235, 217, 100), "Q4_0": (205, 190, 75),
    "Q4_1": (190, 176, 90), "NF4": (222, 160, 220), "FP4": (190, 120, 190), "Q5_K": (135, 205, 110),
    "Q5_0": (100, 175, 85), "Q5_1": (85, 155, 80), "Q6_K": (70, 185, 170), "Q8_0": (85, 150, 245),
    "INT8": (60, 110, 210), "F8_E4M3": (120, 120, 235), "F8_E5M2": (140, 105, 215),
    "F16": (140, 146, 158), "BF16": (120, 126, 138), "F32": (200, 205, 214)
}
ORDER = {name: index for index, name in enumerate(COLORS)}
OTHER_COLORS = ((150, 90, 60), (60, 120, 130), (120, 60, 110), (110, 130, 60))


def color_of(type_name: str) -> Color:
    """Returns the colour of a type, the same in every picture."""
    if type_name in COLORS:
        return COLORS[type_name]
    for prefix in ("INT8", "NF4", "FP4"):
        if type_name.upper().startswith(prefix):
            return COLORS[prefix]
    return OTHER_COLORS[sum(map(ord, type_name)) % len(OTHER_COLORS)]


def inspection_picture(inspection: Inspection) -> torch.Tensor:
    """Draws title, types with their bytes, the cards it fits, and the blocks.

    Returns:
        float32 (1, H, W, 3), values from 0 to 1.
    """
    title = textwrap.wrap(inspection.title, HEADING_LENGTH) or [""]
    blocks = dict(list(inspection.blocks.items())[:MAX_ROWS])
    hidden_count = len(inspection.blocks) - len(blocks)
    legend = _legend_lines(inspection.types)
    notes = cards_notes(inspection)
    errors = block_errors(inspection)
    top = (
        MARGIN
        + 26 * len(title)
        + 26 * len(legend)
        + 20 * len(notes)
        + (42 if blocks else 0)
        + (28 if notes else 0)
    )
    height = top + len(blocks) * ROW + (ROW if hidden_count else 0) + MARGIN
    chart = Chart(height, BAD if inspection.problem else GOOD)
    chart.heading(title)
    _draw_legend(chart, legend)
    if notes:
        memory = cards_title(inspection)
        memory = memory[0].upper() + memory[1:]
        chart.text(memory.replace("×", "x"), FAINT, BODY, down=4)  # the font has no "×"
        chart.y += 28
        for fits, note in notes:
            left = MARGIN + 3
            chart.draw.ellipse((left, chart.y + 4, left + 8, chart.y + 12),
                               fill=GOOD if fits else BAD)
            chart.text(note, FAINT, SMALL, x=21)
            chart.y += 20
    if blocks:
        measured = f"; error against {inspection.reference}" if errors else ""
        chart.text(f"Bytes of each block by type{measured}", FAINT, BODY, down=8)
    chart.bars(_bars(blocks, errors), top, LABELS, BAR_WIDTH)
    if hidden_count:
        chart.draw.text((MARGIN + LABELS, top + len(blocks) * ROW + 2),
                        f"... and {hidden_count} more", FAINT, font(SMALL))
    return chart.tensor()


def _legend_lines(types: dict[str, tuple[int, int]]) -> list[list[tuple[str, str, int]]]:
    """Returns (type, label, width) of each entry, line by line."""
    lines, used_width = [], WIDTH
    for type_name, (_, size) in types.items():
        label = f"{type_name}  {size_text(size)}"
        width = 21 + round(font(BODY).getlength(label)) + 26
        if used_width + width > WIDTH - 2 * MARGIN:
            lines.append([])
            used_width = 0
        lines[-1].append((type_name, label, width))
        used_width += width
    return lines


def _draw_legend(chart: Chart, lines: list[list[tuple[str, str, int]]]):
    for entries in lines:
        x = 0
        for type_name, label, width in entries:
            left = MARGIN + x
            chart.draw.rectangle((left, chart.y + 4, left + 14, chart.y + 18),
                                 fill=color_of(type_name))
            chart.text(label, TEXT, BODY, x=x + 21, down=3)
            x += width
        chart.y += 26


def _bars(blocks: dict[str, dict[str, int]], errors: dict[str, float]) -> list[Bar]:
    """Returns a bar for each block, its types from few bits to many."""
    largest = max((sum(sizes.values()) for sizes in blocks.values()), default=0) or 1
    bars = []
    for block, sizes in blocks.items():
        parts, total = [], 0
        for type_name, size in sorted(sizes.items(), key=lambda item: ORDER.get(item[0], -1)):
            start = BAR_WIDTH * total // largest
            total += size
            end = BAR_WIDTH * total // largest
            if end > start or total == size:
                parts.append((start, max(start, end - 1), color_of(type_name)))
        label = block if len(block) <= LABEL_LENGTH else f"...{block[3 - LABEL_LENGTH:]}"
        error = f"  {error_text(errors[block])}" if block in errors else ""
        bars.append(Bar(label, parts, BAR_WIDTH * total // largest, size_text(total) + error))
    return bars
