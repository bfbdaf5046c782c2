"""Draws the report on a LoRA: a bar chart of how much it changes each block of the model."""
import math
import textwrap

import torch

from .block_chart import BAD, BODY, FAINT, GOOD, HEADING_LENGTH, MARGIN, ROW, WIDTH, Bar, Chart
from .report import LoraReport, percent_text

LABELS, VALUES = 190, 70  # widths of the columns
BAR_WIDTH = WIDTH - 2 * MARGIN - LABELS - VALUES
VERDICTS = {"yes": GOOD, "partly": (238, 190, 90), "no": BAD}
COLORS = ((92, 160, 255), (120, 200, 180), (200, 150, 255), (245, 170, 105), (160, 170, 185))


def report_picture(report: LoraReport, title: str = "") -> torch.Tensor:
    """Draws a bar for each block, in the order of the model.

    A bar is the norm of the change at strength 1, in percent of the norm of the block's weights.

    Args:
        report: of `check_lora`, measured.
        title: first line, such as the file's name.

    Returns:
        A ComfyUI IMAGE: (1, H, W, 3), float32, 0 to 1.
    """
    verdict = textwrap.wrap(report.verdict, HEADING_LENGTH)
    shares, relative = _shares(report)
    top = MARGIN + 26 * len(verdict) + (22 if title else 0) + 60
    chart = Chart(top + len(shares) * ROW + MARGIN, VERDICTS[report.fits])
    if title:
        chart.text(title, FAINT, BODY)
        chart.y += 22
    chart.heading(verdict)
    ranks = f", rank {report.ranks[0]}" if report.ranks else ""
    if len(report.ranks) > 1:
        ranks += f"-{report.ranks[-1]}"
    change_types = ", ".join(report.change_types)
    matched = f"{report.matched} of {report.layers} layers match."
    chart.text(f"{change_types}{ranks}. {matched}", FAINT, BODY, down=4)
    measure = "percent of its weights" if relative else "absolute: the model holds no values"
    caption = f"Change of each block at strength 1, {measure}:" if shares else "Nothing to show."
    chart.text(caption, FAINT, BODY, down=24)
    chart.bars(_bars(shares, relative), top, LABELS, BAR_WIDTH)
    return chart.tensor()


def _shares(report: LoraReport) -> tuple[dict[str, float], bool]:
    """Returns (block -> its change, whether all changes are relative to the blocks' weights).

    Changes beyond the range of numbers are left out, as in the text.
    """
    known = {
        block: (change, norm) for block, (change, norm) in report.blocks.items()
        if change is not None
    }
    shares = {block: change / norm if norm else change for block, (change, norm) in known.items()}
    finite = {block: share for block, share in shares.items() if math.isfinite(share)}
    return finite, all(norm is not None for _, norm in known.values())


def _bars(shares: dict[str, float], relative: bool) -> list[Bar]:
    """Returns a bar for each block, in one color for each group of blocks."""
    largest = max(shares.values(), default=0) or 1
    groups = list(dict.fromkeys(block.partition(".")[0] for block in shares))
    bars = []
    for block, share in shares.items():
        color = COLORS[min(groups.index(block.partition(".")[0]), len(COLORS) - 1)]
        length = round(BAR_WIDTH * share / largest)
        value = percent_text(share) if relative else f"{share:.3g}"
        bars.append(Bar(block, [(0, max(1, length), color)], length, value))
    return bars
