"""Draws groups of bars: seconds of a step, or how many times as long one way takes as another."""
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from featherweight.loaders.lora.block_chart import (
    BODY,
    FAINT,
    GOOD,
    HEADING_LENGTH,
    MARGIN,
    ROW,
    WIDTH,
    Bar,
    Chart,
    Color,
)

LABELS, VALUES = 250, 200  # widths of the columns
BAR_WIDTH = WIDTH - 2 * MARGIN - LABELS - VALUES
GROUP = 44  # height above the bars of a group


class Value(NamedTuple):
    """A bar.

    Attributes:
        label: to its left.
        number: its length, 0 for none.
        text: to its right.
        color: of it.
    """

    label: str
    number: float
    text: str
    color: Color = GOOD


def bar_chart(title: str, groups: Mapping[str, Sequence[Value]]) -> Chart:
    """Draws each group below the last one, its longest bar over the whole width."""
    lines = textwrap.wrap(title, HEADING_LENGTH)
    top = MARGIN + 26 * len(lines)
    height = sum(GROUP + len(values) * ROW for values in groups.values())
    chart = Chart(top + height + MARGIN, GOOD)
    chart.heading(lines)
    for heading, values in groups.items():
        chart.y = top
        chart.text(heading, FAINT, BODY, down=8)
        longest = max((value.number for value in values), default=0.0) or 1.0
        bars = []
        for value in values:
            length = max(0, round(BAR_WIDTH * value.number / longest))
            parts = [(0, length, value.color)] if length else []
            bars.append(Bar(value.label, parts, length, value.text))
        chart.bars(bars, top + GROUP, LABELS, BAR_WIDTH)
        top += GROUP + len(values) * ROW
    return chart
