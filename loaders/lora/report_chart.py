"""The report on a LoRA as a picture: how much each block of the model is changed."""
import textwrap

import torch

from ..chart import BAD, BODY, FAINT, GOOD, HEADING_LENGTH, MARGIN, ROW, WIDTH, Bar, Chart
from .report import LoraReport, percent

LABELS, VALUES = 190, 70
BAR_WIDTH = WIDTH - 2 * MARGIN - LABELS - VALUES
VERDICTS = {"yes": GOOD, "partly": (238, 190, 90), "no": BAD}
BARS = ((92, 160, 255), (120, 200, 180), (200, 150, 255), (245, 170, 105), (160, 170, 185))


def report_picture(report: LoraReport, title: str = "") -> torch.Tensor:
    """A bar for each block, in the order of the model: norm of the change at strength 1 in percent
    of the block's weights.

    title: a line above it all, such as the file's name. Returns (1, H, W, 3), float32, 0 to 1.
    """
    verdict = textwrap.wrap(report.verdict, HEADING_LENGTH)
    shares, relative = _shares(report)
    top = MARGIN + 26 * len(verdict) + (22 if title else 0) + 60
    chart = Chart(top + len(shares) * ROW + MARGIN, VERDICTS[report.fits])
    if title:
        chart.text(title, FAINT, BODY)
        chart.y += 22
    chart.heading(verdict)
    ranks = (
        ""
        if not report.ranks
        else f", rank {'-'.join(map(str, dict.fromkeys((report.ranks[0], report.ranks[-1]))))}"
    )
    matched = f"{', '.join(report.kinds)}{ranks}. {report.matched} of {report.layers} layers match."
    chart.text(matched, FAINT, BODY, down=4)
    measure = "percent of its weights" if relative else "absolute: the model holds no values"
    what = f"Change of each block at strength 1, {measure}:" if shares else "Nothing to draw."
    chart.text(what, FAINT, BODY, down=24)
    chart.bars(_bars(shares, relative), top, LABELS, BAR_WIDTH)
    return chart.tensor()


def _shares(report: LoraReport) -> tuple[dict[str, float], bool]:
    """(block -> how much it is changed, whether all of these are parts of the blocks' weights)."""
    known = {
        block: (change, norm) for block, (change, norm) in report.blocks.items()
        if change is not None
    }
    shares = {block: change / norm if norm else change for block, (change, norm) in known.items()}
    return shares, all(norm is not None for _, norm in known.values())


def _bars(shares: dict[str, float], relative: bool) -> list[Bar]:
    """A bar for each block; blocks of one group have one color."""
    largest = max(shares.values(), default=0) or 1
    groups = list(dict.fromkeys(block.partition(".")[0] for block in shares))
    bars = []
    for block, share in shares.items():
        color = BARS[min(groups.index(block.partition(".")[0]), len(BARS) - 1)]
        length = round(BAR_WIDTH * share / largest)
        bars.append(
            Bar(block, [(0, max(1, length), color)], length,
                percent(share) if relative else f"{share:.3g}"))
    return bars
