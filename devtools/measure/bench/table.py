"""What the cases give as text. A row is {variant: {"median", "min", "max"}} in seconds, the first
variant being what the others are compared with, and "by" a text where kernels were asked for; or
{name: value}: an int is bytes, launches if its name says so, or a bool; a float is seconds if its
name says so; text is text."""

from collections.abc import Callable, Mapping, Sequence


def gathered(cases: Mapping[str, Callable], names: Sequence[str], options) -> dict[str, dict]:
    """Run cases by their names and print each row as it comes: name -> {"about": what it measures,
    "rows": {row: values}}."""
    figures = {}
    for name in names:
        about = " ".join(cases[name].__doc__.split())
        print(f"{name}: {about}", flush=True)
        figures[name] = {"about": about, "rows": {}}
        for row, values in cases[name](options):
            figures[name]["rows"][row] = values
            print("  " + line(row, values), flush=True)
    return figures


def is_timing(row: dict) -> bool:
    return isinstance(next(iter(row.values())), dict)


def ratios(row: dict) -> dict[str, tuple[float, float, float]]:
    """Median, least and most of each variant but the first, over the median of the first."""
    (_, first), *others = row.items()
    return {
        name: tuple(times[key] / first["median"] for key in ("median", "min", "max"))
        for name, times in others
    }


def cells(row: dict) -> dict[str, str]:
    """Variant or name -> what a table shows."""
    if not is_timing(row):
        return {name: quantity(name, value) for name, value in row.items()}
    shown = {name: span(times) for name, times in row.items()}
    for name, (ratio, _, _) in ratios(row).items():
        shown[name] += f", ×{ratio:.2f}"
    return {
        name: ", ".join(filter(None, [cell, row[name].get("by")])) for name, cell in shown.items()
    }


def span(times: dict) -> str:
    """Median and, in brackets, least and most: 1.42 s (1.38-1.60)."""
    scale, unit, digits = (
        (1, "s", 2) if times["median"] >= 1 else (1e3, "ms", 1 if times["median"] >= 0.01 else 3)
    )
    low, median, high = (f"{times[key] * scale:.{digits}f}" for key in ("min", "median", "max"))
    return f"{median} {unit} ({low}-{high})"


def quantity(name: str, value) -> str:
    if isinstance(value, (bool, str)) or name.startswith("launches"):
        return str(value)
    if isinstance(value, int):
        return f"{value / 1e6:.1f} MB"
    if name.endswith("dB"):
        return f"{value:.1f}"
    return f"{value:.1f} s" if name.endswith("seconds") else f"{value:.4f}"


def line(title: str, row: dict) -> str:
    return f"{title:36s} " + " | ".join(f"{name} {cell}" for name, cell in cells(row).items())


def markdown(figures: dict) -> str:
    """Every case as tables, rows of the same variants in one."""
    parts = [
        f"Machine: {figures['machine']}. Times are medians (least-most); × is the ratio to the"
        " first column."
    ]
    for case, found in figures.items():
        if not isinstance(found, dict):
            continue
        parts.append(f"## {case}\n\n{found['about']}")
        tables: dict[tuple, list[str]] = {}
        for title, row in found["rows"].items():
            shown = cells(row)
            tables.setdefault(tuple(shown),
                              []).append(f"| {title} | {' | '.join(shown.values())} |")
        for names, lines in tables.items():
            parts.append("\n".join(
                [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names), *lines]))
    return "\n\n".join(parts) + "\n"
