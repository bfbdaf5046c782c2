"""Pictures of a model's blocks: lines of text, and below them a bar for each block."""
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, ROW = 960, 28, 20
BACKGROUND, TEXT, FAINT, GRID = (24, 26, 31), (236, 238, 242), (150, 156, 168), (52, 56, 66)
GOOD, BAD = (105, 200, 130), (235, 110, 105)
HEADING, BODY, SMALL = 19, 15, 13  # sizes of the font
HEADING_LENGTH = 92  # letters in a line of the heading
QUARTERS = 4  # of the width that lines of the grid stand at

Color = tuple[int, int, int]
font = functools.cache(ImageFont.load_default)


@dataclass(frozen=True)
class Bar:
    """One row of a chart.

    label: before the bar. parts: (first pixel, last pixel, color), counted from the bars' left
    side.
    length: of the whole bar. value: behind it.
    """

    label: str
    parts: Sequence[tuple[int, int, Color]]
    length: int
    value: str


class Chart:
    """A picture that is drawn from the top down. y: where the next line stands."""

    def __init__(self, height: int, color: Color):
        """color: of the stripe at the left edge, which says whether all is well."""
        self.image = Image.new("RGB", (WIDTH, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.rectangle((0, 0, 7, height), fill=color)
        self.y = MARGIN - 6

    def text(self, text: str, color: Color, size: int, x: int = 0, down: int = 0):
        """Write at the current line. x: from the margin; down: from the line's top."""
        self.draw.text((MARGIN + x, self.y + down), text, color, font(size))

    def heading(self, lines: Iterable[str]):
        for line in lines:
            self.text(line, TEXT, HEADING)
            self.y += 26

    def bars(self, bars: Sequence[Bar], top: int, labels: int, width: int):
        """Draw bars of at most `width` pixels from `top` down, `labels` pixels from the margin,
        over a grid."""
        left, bottom = MARGIN + labels, top + len(bars) * ROW
        for quarter in range(QUARTERS + 1) if bars else ():
            x = left + width * quarter // QUARTERS
            self.draw.line((x, top - 4, x, bottom + 4), fill=GRID)
        for index, bar in enumerate(bars):
            y = top + index * ROW
            self.draw.text((left - 10, y + ROW // 2), bar.label, TEXT, font(SMALL), anchor="rm")
            for first, last, color in bar.parts:
                self.draw.rectangle((left + first, y + 3, left + last, y + ROW - 4), fill=color)
            self.draw.text((left + bar.length + 8, y + ROW // 2), bar.value, FAINT, font(SMALL),
                           anchor="lm")

    def tensor(self) -> torch.Tensor:
        """The picture as the host takes it: (1, H, W, 3), float32, 0 to 1."""
        return torch.from_numpy(np.array(self.image, dtype=np.float32) / 255)[None]
