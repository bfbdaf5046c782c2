"""Draws pictures of a model's blocks: lines of text with a bar chart below them."""
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
QUARTERS = 4  # the grid divides the width of the bars into so many parts

Color = tuple[int, int, int]
font = functools.cache(ImageFont.load_default)


@dataclass(frozen=True)
class Bar:
    """One row of a chart.

    Attributes:
        label: text to the left of the bar.
        parts: (first pixel, last pixel, color) of each colored part, from the bar's left end.
        length: of the whole bar, in pixels.
        value: text to the right of the bar.
    """

    label: str
    parts: Sequence[tuple[int, int, Color]]
    length: int
    value: str


class Chart:
    """A picture that is drawn from the top down; `y` is the top of the next line.

    Args:
        height: in pixels.
        color: of the stripe at the left edge, such as `GOOD` or `BAD`.
    """

    def __init__(self, height: int, color: Color):
        self.image = Image.new("RGB", (WIDTH, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.rectangle((0, 0, 7, height), fill=color)
        self.y = MARGIN - 6

    def text(self, text: str, color: Color, size: int, x: int = 0, down: int = 0):
        """Writes at the current line, `x` pixels from the margin, `down` below the line's top."""
        self.draw.text((MARGIN + x, self.y + down), text, color, font(size))

    def heading(self, lines: Iterable[str]):
        for line in lines:
            self.text(line, TEXT, HEADING)
            self.y += 26

    def bars(self, bars: Sequence[Bar], top: int, labels: int, width: int):
        """Draws a bar chart over a grid.

        Args:
            bars: from the top down.
            top: of the first bar.
            labels: width of the column of labels.
            width: of the grid, which no bar exceeds.
        """
        left, bottom = MARGIN + labels, top + len(bars) * ROW
        if bars:
            for quarter in range(QUARTERS + 1):
                x = left + width * quarter // QUARTERS
                self.draw.line((x, top - 4, x, bottom + 4), fill=GRID)
        for index, bar in enumerate(bars):
            y = top + index * ROW
            middle = y + ROW // 2
            self.draw.text((left - 10, middle), bar.label, TEXT, font(SMALL), anchor="rm")
            for first, last, color in bar.parts:
                self.draw.rectangle((left + first, y + 3, left + last, y + ROW - 4), fill=color)
            end = left + bar.length
            self.draw.text((end + 8, middle), bar.value, FAINT, font(SMALL), anchor="lm")

    def tensor(self) -> torch.Tensor:
        """Returns the picture as a ComfyUI IMAGE: (1, H, W, 3), float32, 0 to 1."""
        return torch.from_numpy(np.array(self.image, dtype=np.float32) / 255)[None]
