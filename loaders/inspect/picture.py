"""A model as a picture: a bar for each block, as long as its bytes, coloured by their types."""
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..sizes import size_text
from .inspection import Inspection
from .text import block_errors, cards_notes, cards_title, error_text

WIDTH, MARGIN, LABELS, VALUES, ROW = 960, 28, 230, 150, 20
MOST_ROWS = 110
BACKGROUND, TEXT, FAINT, GRID = (24, 26, 31), (236, 238, 242), (150, 156, 168), (52, 56, 66)
GOOD, BAD = (105, 200, 130), (235, 110, 105)
# From few bits, red, to many, blue; what is not packed is grey, lighter the wider it is.
COLORS = {
    "Q2_K": (214, 69, 65), "Q3_K": (238, 122, 72), "IQ4_XS": (246, 180, 82), "IQ4_NL": (214, 150, 60),
    "Q4_K": (235, 217, 100), "Q4_0": (205, 190, 75), "Q4_1": (190, 176, 90), "NF4": (222, 160, 220),
    "FP4": (190, 120, 190), "Q5_K": (135, 205, 110), "Q5_0": (100, 175, 85), "Q5_1": (85, 155, 80),
    "Q6_K": (70, 185, 170), "Q8_0": (85, 150, 245), "INT8": (60, 110, 210), "F8_E4M3": (120, 120, 235),
    "F8_E5M2": (140, 105, 215), "F16": (140, 146, 158), "BF16": (120, 126, 138), "F32": (200, 205, 214),
}
ORDER = {kind: place for place, kind in enumerate(COLORS)}
OTHERS = ((150, 90, 60), (60, 120, 130), (120, 60, 110), (110, 130, 60))


def color_of(kind: str) -> tuple[int, int, int]:
    """The same colour for a type in every picture."""
    if kind in COLORS:
        return COLORS[kind]
    start = next((known for known in ("INT8", "NF4", "FP4") if kind.upper().startswith(known)), None)
    return COLORS[start] if start else OTHERS[sum(map(ord, kind)) % len(OTHERS)]


def inspection_picture(found: Inspection) -> torch.Tensor:
    """Title, types with their bytes, which cards it fits, and the blocks. Returns (1, H, W, 3), float32, 0 to 1."""
    heading, body, small = (ImageFont.load_default(size) for size in (19, 15, 13))
    title = textwrap.wrap(found.title, 92) or [""]
    rows = list(found.blocks.items())[:MOST_ROWS]
    more = len(found.blocks) - len(rows)
    legend = _legend_rows(list(found.types.items()), body)
    notes = cards_notes(found)
    top = MARGIN + 26 * len(title) + 26 * len(legend) + 20 * len(notes) + (42 if rows else 0) + (28 if notes else 0)
    height = top + len(rows) * ROW + (ROW if more else 0) + MARGIN
    picture = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 7, height), fill=BAD if found.problem else GOOD)

    y = MARGIN - 6
    for line in title:
        draw.text((MARGIN, y), line, TEXT, heading)
        y += 26
    for entries in legend:
        x = MARGIN
        for kind, label, width in entries:
            draw.rectangle((x, y + 4, x + 14, y + 18), fill=color_of(kind))
            draw.text((x + 21, y + 3), label, TEXT, body)
            x += width
        y += 26
    if notes:
        title = cards_title(found)
        draw.text((MARGIN, y + 4), (title[0].upper() + title[1:]).replace("×", "x"), FAINT, body)  # which the font lacks
        y += 28
        for whole, note in notes:
            draw.ellipse((MARGIN + 3, y + 4, MARGIN + 11, y + 12), fill=GOOD if whole else BAD)
            draw.text((MARGIN + 21, y), note, FAINT, small)
            y += 20
    errors = block_errors(found)
    if rows:
        measured = f"; error against {found.reference}" if errors else ""
        draw.text((MARGIN, y + 8), f"Bytes of each block by type{measured}", FAINT, body)
    _draw_bars(draw, rows, errors, top, small)
    if more:
        draw.text((MARGIN + LABELS, top + len(rows) * ROW + 2), f"... and {more} more", FAINT, small)
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def _legend_rows(types: list, font) -> list[list[tuple[str, str, int]]]:
    """(type, label, width) of each entry, line by line."""
    lines, room = [[]], 0
    for kind, (_, size) in types:
        label = f"{kind}  {size_text(size)}"
        width = 21 + round(font.getlength(label)) + 26
        if room + width > WIDTH - 2 * MARGIN and lines[-1]:
            lines.append([])
            room = 0
        lines[-1].append((kind, label, width))
        room += width
    return lines if types else []


def _draw_bars(draw, rows: list, errors: dict[str, float], top: int, font):
    left, right = MARGIN + LABELS, WIDTH - MARGIN - VALUES
    most = max((sum(of_types.values()) for _, of_types in rows), default=0) or 1
    for part in range(5) if rows else ():
        x = left + (right - left) * part // 4
        draw.line((x, top - 4, x, top + len(rows) * ROW + 4), fill=GRID)
    for index, (block, of_types) in enumerate(rows):
        y, spent = top + index * ROW, 0
        draw.text((left - 10, y + ROW // 2), block if len(block) <= 30 else f"...{block[-27:]}", TEXT, font, anchor="rm")
        for kind, size in sorted(of_types.items(), key=lambda item: ORDER.get(item[0], -1)):
            start = left + (right - left) * spent // most
            spent += size
            end = left + (right - left) * spent // most
            if end > start or spent == size:
                draw.rectangle((start, y + 3, max(start, end - 1), y + ROW - 4), fill=color_of(kind))
        label = size_text(spent) + (f"  {error_text(errors[block])}" if block in errors else "")
        draw.text((left + (right - left) * spent // most + 8, y + ROW // 2), label, FAINT, font, anchor="lm")
