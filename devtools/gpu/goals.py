"""The figures to reach: what is expected of an H100."""
from devtools.measure.figures import ratios
from devtools.measure.timing import FORMATS

from devtools import markdown_table

# (stage, row, variant, the most that its time may be of the row's first variant)
GOALS = [
    *(("shapes", "3072 x 12288, bfloat16, M = 4608", name, 1.08) for name in FORMATS),
    *(("shapes", "3072 x 12288, bfloat16, M = 1", name, 1.50) for name in FORMATS),
    *(("shapes", "3072 x 12288, bfloat16, M = 4608", f"{name} int8", 0.70) for name in FORMATS),
    *(("model", "2 + 4 blocks, bfloat16, 4096 tokens", name, 1.05) for name in FORMATS),
    ("step", "Featherweight, bfloat16", "2 of rank 16", 1.10),
    ("LoRA", "3072 x 12288, bfloat16, M = 4096", "2 of rank 16", 1.10),
    ("static", "a budget of 30 %", "profiled", 1.00),
]


def goals(figures: dict) -> list[tuple[str, str, str, str]]:
    """Returns (what is measured, the goal, the figure, whether it is reached) of each goal of the
    stages that have begun."""
    lines = []
    for stage, title, variant, most in GOALS:
        if stage not in figures:
            continue
        row = figures[stage]["rows"].get(title)
        found = ratios(row)[variant][0] if row and variant in row else None
        verdict = "not measured" if found is None else "reached" if found <= most else "missed"
        by = f" ({row[variant]['by']})" if found is not None and "by" in row[variant] else ""
        lines.append((f"{stage}: {title}, {variant}{by}", f"×{most:.2f}",
                      "" if found is None else f"×{found:.2f}", verdict))
    return lines


def closing(figures: dict, is_judged: bool) -> str:
    """Returns what ends the report of a run: the goals, unless it is at a tiny size, and how each
    stage ended."""
    ended = [(name, found["ended"]) for name, found in figures.items() if isinstance(found, dict)]
    judged = f"## Figures to reach\n\n{markdown_table(['', 'wanted', 'found', ''], goals(figures))}"
    return f"{judged if is_judged else ''}\n## Stages\n\n{markdown_table(['', ''], ended)}"
