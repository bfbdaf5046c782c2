"""The report on a LoRA as a picture: how much each block of the model is changed."""
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .report import LoraReport, percent

WIDTH, MARGIN, LABELS, ROW = 960, 28, 190, 20
BACKGROUND, TEXT, FAINT, GRID = (24, 26, 31), (236, 238, 242), (150, 156, 168), (52, 56, 66)
VERDICTS = {"yes": (105, 200, 130), "partly": (238, 190, 90), "no": (235, 110, 105)}
BARS = ((92, 160, 255), (120, 200, 180), (200, 150, 255), (245, 170, 105), (160, 170, 185))


def report_picture(report: LoraReport, title: str = "") -> torch.Tensor:
    """A bar for each block, in the order of the model: norm of the change at strength 1 in percent of the block's weights.

    title: a line above it all, such as the file's name. Returns (1, H, W, 3), float32, 0 to 1.
    """
    heading, body, small = (ImageFont.load_default(size) for size in (19, 15, 13))
    verdict = textwrap.wrap(report.verdict, 92)
    rows = [(block, change / norm if norm else change, norm is not None) for block, (change, norm) in report.blocks.items()
            if change is not None]
    top = MARGIN + 26 * len(verdict) + (22 if title else 0) + 60
    picture = Image.new("RGB", (WIDTH, top + len(rows) * ROW + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 7, picture.height), fill=VERDICTS[report.fits])

    y = MARGIN - 6
    if title:
        draw.text((MARGIN, y), title, FAINT, body)
        y += 22
    for line in verdict:
        draw.text((MARGIN, y), line, TEXT, heading)
        y += 26
    kinds = ", ".join(report.kinds)
    ranks = "" if not report.ranks else f", rank {'-'.join(map(str, dict.fromkeys((report.ranks[0], report.ranks[-1]))))}"
    relative = all(known for *_, known in rows)
    measure = "percent of its weights" if relative else "absolute: the model holds no values"
    draw.text((MARGIN, y + 4), f"{kinds}{ranks}. {report.matched} of {report.layers} layers match.", FAINT, body)
    what = f"Change of each block at strength 1, {measure}:" if rows else "Nothing to draw."
    draw.text((MARGIN, y + 24), what, FAINT, body)

    most = max((share for _, share, _ in rows), default=0) or 1
    groups = list(dict.fromkeys(block.partition(".")[0] for block, *_ in rows))
    left, right = MARGIN + LABELS, WIDTH - MARGIN - 70
    for part in range(5) if rows else ():
        x = left + (right - left) * part // 4
        draw.line((x, top - 4, x, top + len(rows) * ROW + 4), fill=GRID)
    for index, (block, share, _) in enumerate(rows):
        y = top + index * ROW
        color = BARS[min(groups.index(block.partition(".")[0]), len(BARS) - 1)]
        length = round((right - left) * share / most)
        draw.text((left - 10, y + ROW // 2), block, TEXT, small, anchor="rm")
        draw.rectangle((left, y + 3, left + max(1, length), y + ROW - 4), fill=color)
        label = percent(share) if relative else f"{share:.3g}"
        draw.text((left + length + 8, y + ROW // 2), label, FAINT, small, anchor="lm")
    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]
