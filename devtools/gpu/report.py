"""The report of a run, written anew after each row, so that one that is cut off leaves what it
had."""
import json
from pathlib import Path

from devtools.measure.bench.picture import draw
from devtools.measure.bench.table import markdown, ratios

# (stage, row, variant, the most that its time may be of the row's first variant): what is to be
# reached on an NVIDIA GPU.
GOALS = [
    *(("shapes", "3072 x 12288, bfloat16, M = 4608", name, 1.10)
      for name in ("Q8_0", "Q4_K", "NF4")),
    *(("shapes", "3072 x 12288, bfloat16, M = 1", name, 0.6) for name in ("Q8_0", "Q4_K", "NF4")),
    *(("shapes", "3072 x 12288, bfloat16, M = 4608", f"{name} int8", 0.85)
      for name in ("Q8_0", "Q4_K", "NF4")),
    *(("model", "2 + 4 blocks, bfloat16, 4096 tokens", name, 1.08)
      for name in ("Q8_0", "Q4_K", "NF4")), ("step", "Featherweight", "2 of rank 16", 1.04)
]


class Report:
    def __init__(self, folder: Path, is_judged: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.is_judged, self.figures = folder, is_judged, {"machine": "unknown"}

    def begin(self, stage: str, about: str):
        self.figures[stage] = {"about": about, "rows": {}, "ended": "cut off"}
        self.write()

    def add(self, stage: str, title: str, values: dict):
        self.figures[stage]["rows"][title] = values
        self.write()

    def end(self, stage: str, how: str):
        self.figures[stage]["ended"] = how
        self.write()

    def write(self):
        for name, text in ("gpu.json", json.dumps(self.figures, indent=1)), ("gpu.md", self.text()):
            (self.folder / name).write_text(text, encoding="utf-8")

    def draw(self):
        draw(self.figures).save(self.folder / "gpu.png")

    def text(self) -> str:
        stages = {name: found for name, found in self.figures.items() if isinstance(found, dict)}
        ended = "\n".join(f"| {name} | {found['ended']} |" for name, found in stages.items())
        goals = "\n".join(f"| {' | '.join(row)} |" for row in self.goals())
        return (
            f"{markdown(self.figures)}\n## Figures to reach\n\n| | wanted | found |"
            f" |\n|---|---|---|---|\n{goals}\n\n## Stages\n\n| | |\n|---|---|\n{ended}\n")

    def goals(self) -> list[tuple[str, str, str, str]]:
        """What is wanted, found, and whether it is reached; nothing of a run at a tiny size."""
        lines = []
        for stage, title, variant, most in GOALS if self.is_judged else ():
            row = self.figures.get(stage, {}).get("rows", {}).get(title)
            found = ratios(row)[variant][0] if row and variant in row else None
            verdict = "not measured" if found is None else "reached" if found <= most else "missed"
            by = f" ({row[variant]['by']})" if found is not None and "by" in row[variant] else ""
            lines.append((f"{stage}: {title}, {variant}{by}", f"×{most:.2f}",
                          "" if found is None else f"×{found:.2f}", verdict))
        return lines
