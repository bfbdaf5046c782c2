"""What a soak's readings come to: the bounds that must hold, and a picture of how they went."""
import statistics

from PIL import Image, ImageDraw, ImageFont

from devtools.soak.run import RunLog

GROWTH = 0.01  # of the resident memory after the warm-up
ENOUGH = 16  # readings of which a growth can be told
NAMES = {
    "rss": "resident memory, MB", "private": "private memory, MB",
    "tensors": "tensors that Python holds, MB", "mapped": "model files mapped",
    "open": "open files", "threads": "threads", "temporary": "temporary files",
    "seconds": "seconds per prompt (median)"
}
WIDTH, HEIGHT, GAP, LEFT = 560, 150, 24, 70  # pixels of a panel
PAPER, PANEL, INK, FAINT, LINE = "#f4f4f2", "#ffffff", "#222222", "#8a8a8a", "#2a9d8f"


def growth(readings: list[dict], name: str = "rss") -> float | None:
    """What a value has grown by after the first quarter of the readings, relative: along the line
    that fits them best.

    None of too few readings.
    """
    if len(readings) < ENOUGH:
        return None
    late = readings[len(readings) // 4:]
    slope, start = statistics.linear_regression([reading["prompts"] for reading in late],
                                                [reading[name] for reading in late])
    first, last = (start + slope * late[at]["prompts"] for at in (0, -1))
    return last / first - 1


def broken(run_log: RunLog) -> list[str]:
    """The bounds that do not hold, each in a sentence."""
    found = list(run_log.mistakes)
    grown = growth(run_log.readings)
    if grown is not None and grown >= GROWTH:
        found.append(
            f"Resident memory has grown by {grown:.1%} after the warm-up, of {GROWTH:.0%} that it"
            " may."
        )
    late = run_log.readings[len(run_log.readings) // 4:]
    for name in ("mapped", "open", "temporary"):
        if late and late[-1][name] > late[0][name]:
            found.append(
                f"{NAMES[name]}: {late[0][name]} after the warm-up, {late[-1][name]} at the end.")
    return found


def closing_line(run_log: RunLog) -> str:
    grown, last = growth(run_log.readings), run_log.readings[-1] if run_log.readings else None
    memory = (
        "too few readings to tell a growth"
        if grown is None
        else f"resident memory {grown:+.2%} after the warm-up"
    )
    files = f", {last['mapped']} files mapped, {last['open']} open" if last else ""
    minutes = f" in {last['minutes']:.0f} minutes" if last else ""
    bad = broken(run_log)
    return (
        f"{'Failed' if bad else 'Done'}: {run_log.prompts} prompts{minutes}, {run_log.repeated} "
        f"repeated pictures compared, {len(run_log.mistakes)} mistakes, {memory}{files}")


def plot(readings: list[dict], title: str, subtitle: str) -> Image.Image:
    """Each value over the number of prompts."""
    rows = -(-len(NAMES) // 2)
    picture = Image.new("RGB", (GAP + 2 * (WIDTH + GAP), 60 + rows * (HEIGHT + GAP)), PAPER)
    pen, font, small = (
        ImageDraw.Draw(picture),
        ImageFont.load_default(16),
        ImageFont.load_default(12),
    )
    pen.text((GAP, 12), title, INK, font)
    pen.text((GAP, 34), subtitle, FAINT, small)
    most = max((reading["prompts"] for reading in readings), default=1)
    for index, (name, text) in enumerate(NAMES.items()):
        left, top = GAP + index % 2 * (WIDTH + GAP), 56 + index // 2 * (HEIGHT + GAP)
        pen.rectangle((left, top, left + WIDTH, top + HEIGHT), PANEL)
        pen.text((left + 10, top + 6), text, INK, small)
        high = max((reading[name] for reading in readings), default=0) * 1.15 or 1.15
        for value in (0, high / 1.15):
            y = top + HEIGHT - 20 - (HEIGHT - 50) * value / high
            pen.text((left + 8, y - 7), f"{value:.4g}", FAINT, small)
            pen.line((left + LEFT, y, left + WIDTH - 12, y), "#e6e6e6")
        points = [(left + LEFT + (WIDTH - LEFT - 12) * reading["prompts"] / most,
                   top + HEIGHT - 20 - (HEIGHT - 50) * reading[name] / high)
                  for reading in readings]
        pen.line(points, LINE, 2)
        pen.text((left + WIDTH - 110, top + HEIGHT - 16), f"{most} prompts", FAINT, small)
    return picture.quantize(16)
