"""What is said about how a LoRA fits a model: the figures, one sentence, and a short table."""
import collections
import math
from dataclasses import dataclass, field

from .families import FamilyMatch

MISSING = "missing in the model"


@dataclass
class LoraReport:
    """How a LoRA fits a model (and its text encoder).

    patches: what fits, as the host's `add_patches` takes it. layers, matched: layers meant for what
    is connected, and those of them that fit. misfits: layer -> why it does not. unconnected: text
    encoder layers without a text encoder. unread: tensors nobody knows. kinds: kind -> layers.
    ranks: of all layers, sorted. family, model_family: what each looks like.
    said: what the file says it is for. blocks: block -> (norm of the change at strength 1, norm of
    its weights); the first is None where it is not known cheaply, the second where the model has no
    values.
    """

    patches: dict
    layers: int
    matched: int
    misfits: dict[str, str]
    unconnected: int
    unread: list[str]
    kinds: collections.Counter
    ranks: list[int]
    family: FamilyMatch | None
    model_family: FamilyMatch | None
    said: str
    metadata: dict[str, str]
    blocks: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def related(self) -> bool:
        """Whether nothing speaks against the LoRA being made for this family of models."""
        return (
            not self.family
            or not self.model_family
            or self.family.shared(self.model_family) is not None
        )

    @property
    def fits(self) -> str:
        """"yes": every layer; "partly": some; "no": none, or the few layers that another family
        happens to have too."""
        if not self.patches or (not self.related and self.matched * 2 < self.layers):
            return "no"
        return "partly" if self.misfits else "yes"

    @property
    def verdict(self) -> str:
        """One sentence on whether this LoRA can be used with this model."""
        if not self.layers:
            return f"This LoRA changes only a text encoder ({self.unconnected} layers), and none is connected."
        if not self.related:
            made = f"This LoRA is made for {self.family}; the model is {self.model_family}"
            if self.fits == "no":
                same = (
                    f", though {self.matched} of its {self.layers} layers have the same shape"
                    if self.matched
                    else ""
                )
                return f"{made}: it cannot be used{same}."
            return f"{made}: only {self.matched} of its {self.layers} layers match, which is not what it was trained for."
        made = self.family.shared(self.model_family) if self.family else None
        name = f" for {' or '.join(made.names)}" if made else ""
        if self.fits == "yes":
            return f"This LoRA{name} fits: all {self.layers} layers match the model."
        if self.fits == "partly":
            return f"This LoRA{name} fits in part: {self.matched} of {self.layers} layers match the model."
        layer, reason = next(iter(self.misfits.items()))
        return (
            f"None of the {self.layers} layers of this LoRA{name} matches the model"
            f" ({self.model_family or 'unknown'}): {layer}: {reason}.")


def report_text(report: LoraReport, name: str = "", settings: dict[str, str] | None = None,
                examples: int = 10) -> str:
    """The report as a short table, the verdict first. name: of the file. settings: further rows,
    such as the strengths."""
    kinds = ", ".join(f"{kind} ({count})" if len(report.kinds) > 1 else kind
                      for kind, count in report.kinds.items())
    ranks = "" if not report.ranks else f", rank {report.ranks[0]}" + (
        f" to {report.ranks[-1]}" if len(report.ranks) > 1 else "")
    family = report.family and (report.family.shared(report.model_family) or report.family)
    rows = {
        **({"file": name} if name else {}), "layers": f"{report.matched} of {report.layers} match",
        "kind": kinds + ranks, **(settings or {}), "made for": f"{family or 'unknown'}" +
        (f"; the file says {report.said}" if report.said else ""),
        "model": f"{report.model_family or 'unknown'}"
    }
    shares = ((change / norm, block) for block, (change, norm) in report.blocks.items()
              if change and norm and math.isfinite(change / norm))
    strongest = sorted(shares, reverse=True)
    if strongest:
        rows["strongest"] = ", ".join(f"{block} {percent(share)}" for share, block in strongest[:3])
    elif report.blocks and not any(
        change for change, _ in report.blocks.values() if change is not None
    ):
        rows["strongest"] = "nothing: all its values are zero, it has no effect"
    if report.unconnected:
        rows["not used"] = f"{report.unconnected} text encoder layers (no CLIP connected)"
    lines = [report.verdict, "", *(f"{name}: {value}" for name, value in rows.items())]
    missing = sum(reason == MISSING for reason in report.misfits.values())
    missing = f" ({missing} of them {MISSING})" if missing else ""
    for title, entries in ((f"{len(report.misfits)} layers do not fit{missing}:",
                            [f"{name}: {why}" for name, why in report.misfits.items()]),
                           (f"{len(report.unread)} tensors are of no known kind:", report.unread)):
        if entries:
            lines += ["", title, *(f"  {entry}" for entry in entries[:examples])]
            if entries[examples:]:
                lines.append(f"  … and {len(entries) - examples} more")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share for people: 12 %, 1.8 %, 0.043 %."""
    value = 100 * share
    return (
        f"{value:.{max(0, min(4, 1 - math.floor(math.log10(value))))}f} %" if value > 0 else "0 %"
    )
