"""Reports how a LoRA fits a model: the figures, a verdict in one sentence, and a short table."""
import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...ops.patches.adapters import OTHER_SIZE
from ..container.weight_file import safe_repr
from ..name_lists import join_some
from .family_match import FamilyMatch
from .header_alpha import HeaderAlpha
from .model_blocks import weight_key
from .training_base import Said, training_line

MISSING = "missing in the model"
TOO_STRONG = 100  # times as large as the weights of a block
EXAMPLES = 10  # layers and tensors that a report lists at most


@dataclass
class LoraReport:
    """How a LoRA fits a model and its text encoder.

    Attributes:
        patches: the matching layers, as the host's `add_patches` takes them.
        layers: number of layers for what is connected.
        matched: number of them that match.
        mismatches: layer -> why it does not match.
        unconnected: number of text encoder layers without a text encoder.
        unread: names of tensors, for what is connected, that nobody reads.
        change_types: `change_type` -> number of layers.
        ranks: of all layers, sorted.
        family, model_family: families that the LoRA and the model belong to.
        hints: what the file's metadata says about the model it is made for.
        metadata: of the file.
        blocks: block -> (norm of its change at strength 1, or None if it is not known cheaply;
            norm of its weights, or None if the model has no values).
        header_alpha: what is known of alpha besides tensors.
        use_header_alpha: whether it counts in `patches`.
        alphas: where it stands -> (alpha, factor on the product) of its layers.
        load_lora: what ComfyUI's own node does otherwise.
        embeddings: names of tensors that are embeddings for prompts.
        text_encoder: names of the text encoders, if all layers are for one and some are connected.
        model_words: whether the model is a base or a distilled one, None if nothing says it.
    """

    patches: dict
    layers: int
    matched: int
    mismatches: dict[str, str]
    unconnected: int
    unread: list[str]
    change_types: collections.Counter
    ranks: list[int]
    family: FamilyMatch | None
    model_family: FamilyMatch | None
    hints: str
    metadata: dict[str, str]
    blocks: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    header_alpha: HeaderAlpha = field(default_factory=lambda: HeaderAlpha({}, []))
    use_header_alpha: bool = True
    alphas: dict[str, set[tuple[float, float]]] = field(default_factory=dict)
    load_lora: str = ""
    embeddings: list[str] = field(default_factory=list)
    text_encoder: str = ""
    model_words: Said | None = None

    @property
    def related(self) -> bool:
        """Whether the LoRA may be made for the model's family."""
        return (
            not self.family
            or not self.model_family
            or self.family.shared(self.model_family) is not None
        )

    @property
    def fits(self) -> str:
        """"yes": all layers match, and every tensor is read; "partly": some do; "no": none, or
        less than half of the layers of a LoRA for another family."""
        if not self.patches or (not self.related and self.matched * 2 < self.layers):
            return "no"
        return "partly" if self.misfits else "yes"

    @property
    def misfits(self) -> list[str]:
        """What is left out: `name: why` of layers, then of tensors."""
        return [
            *(f"{layer}: {reason}" for layer, reason in self.mismatches.items()),
            *(f"{name}: of an unknown kind" for name in self.unread),
        ]

    @property
    def verdict(self) -> str:
        """One sentence on whether this LoRA can be used with this model."""
        match = f"{self.matched} of its {self.layers} layers"
        is_one = self.matched == 1
        if not self.layers:
            return (
                f"This LoRA changes only a text encoder ({self.unconnected} layers), and none is"
                " connected.")
        if not self.related:
            start = f"This LoRA is made for {self.family}; the model is {self.model_family}"
            if self.fits == "no":
                have = "has" if is_one else "have"
                same = f", though {match} {have} the same shape" if self.matched else ""
                return f"{start}: it cannot be used{same}."
            trained = "which is not what it was trained for"
            if self.matched == self.layers:
                return f"{start}, {trained}, though its layers have the same shape."
            return f"{start}: only {match} {'matches' if is_one else 'match'}, {trained}."
        shared = self.family.shared(self.model_family) if self.family else None
        families = f" for {' or '.join(shared.names)}" if shared else ""
        if self.fits == "yes":
            return f"This LoRA{families} fits: all {self.layers} layers match the model."
        if self.fits == "partly":
            matched = f"{self.matched} of" if self.mismatches else "all"
            unread = (
                f", and tensors of an unknown kind ({len(self.unread)}) are left out"
                if self.unread else "")
            sizes = (" The rest are for a variant of it whose layers have another size, such as one"
                     " for inpainting, or one that is not pruned."
                     if shared and self.mismatches and all(
                         reason.startswith(OTHER_SIZE) for reason in self.mismatches.values())
                     else "")
            return (
                f"This LoRA{families} fits in part: {matched} {self.layers} layers match the"
                f" model{unread}.{sizes}")
        layer, reason = next(iter(self.mismatches.items()))
        model = (f"text encoder ({self.text_encoder})" if self.text_encoder
                 else f"model ({self.model_family or 'unknown'})")
        return (f"None of the {self.layers} layers of this LoRA{families} matches the {model}:"
                f" {layer}: {reason}.")

    @property
    def alpha_note(self) -> str:
        """A sentence, if an alpha that is left out makes a difference; else ""."""
        scales = self.header_alpha.scales.values()
        if self.use_header_alpha or all(scale == 1 for scale, _ in scales):
            return ""
        return (f"Its writer means {_range(scale for scale, _ in scales)} times this strength, by"
                f" {' and '.join({source: 1 for _, source in scales})}, which is not applied.")

    @property
    def shares(self) -> list[tuple[float, str]]:
        """(change at strength 1 by the weights' norm, block) of blocks of which both are known, the
        largest first."""
        return sorted(((change / norm, block) for block, (change, norm) in self.blocks.items()
                       if change and norm and not math.isnan(change / norm)), reverse=True)

    @property
    def strength_note(self) -> str:
        """A sentence, if the LoRA is far stronger than any that is trained; else ""."""
        share, block = next(iter(self.shares), (0.0, ""))
        if share <= TOO_STRONG:
            return ""
        return (f"At strength 1 its change of {block} is {share:,.0f} times as large as the weights"
                " there, which makes images noise: its values are damaged, or it is written for"
                " another alpha. Get it again where it was published.")


def report_text(report: LoraReport, name: str = "", settings: dict[str, str] | None = None) -> str:
    """Returns the report as a short table, the verdict first.

    Args:
        report: of `check_lora`.
        name: of the file.
        settings: further rows, such as the strengths.
    """
    change_types = ", ".join(
        f"{change_type} ({count})" if len(report.change_types) > 1 else change_type
        for change_type, count in report.change_types.items())
    ranks = f", rank {report.ranks[0]}" if report.ranks else ""
    if len(report.ranks) > 1:
        ranks += f" to {report.ranks[-1]}"
    family = report.family and (report.family.shared(report.model_family) or report.family)
    hints = f"; the file says {report.hints}" if report.hints else ""
    rows = {
        **({"file": name} if name else {}),
        "kind": change_types + ranks,
        **({"alpha": alpha} if (alpha := _alpha_text(report)) else {}),
        **({"Load LoRA": report.load_lora} if report.load_lora else {}),
        **(settings or {}),
        "made for": f"{family or 'unknown'}{hints}",
        "model": f"{report.model_family or 'unknown'}",
        "training": training_line(report.metadata, name,
                                  [*map(weight_key, report.patches), *report.mismatches],
                                  report.model_words),
    }
    if report.shares:
        rows["strongest"] = ", ".join(
            f"{block} {percent_text(share)}" for share, block in report.shares[:3])
    elif report.blocks and all(change == 0 for change, _ in report.blocks.values()):
        rows["strongest"] = "nothing: all its values are zero, it has no effect"
    elif report.blocks:
        rows["strongest"] = "not known: it depends on all values of the model"
    if report.unconnected:
        rows["not used"] = f"{report.unconnected} text encoder layers (no CLIP connected)"
    if report.embeddings:
        names = dict.fromkeys(name.split(".")[1] for name in report.embeddings)
        rows["embeddings"] = (
            f"{join_some(map(safe_repr, names))}. No LoRA loader applies them: copy the file into"
            " models/embeddings and write embedding:its-name into the prompt.")
    verdicts = [report.verdict, *filter(None, [report.strength_note, report.alpha_note])]
    lines = [*verdicts, "", *(f"{name}: {value}" for name, value in rows.items())]
    missing = list(report.mismatches.values()).count(MISSING)
    lines += _list_lines(
        f"{len(report.mismatches)} layers do not fit"
        f"{f' ({missing} of them {MISSING})' if missing else ''}:",
        [f"{layer}: {reason}" for layer, reason in report.mismatches.items()])
    lines += _list_lines(f"{len(report.unread)} tensors are of an unknown kind:", report.unread)
    return "\n".join(lines)


def _alpha_text(report: LoraReport) -> str:
    """Returns the alphas of all layers, and where they stand; "" for none."""
    skipped = {source for _, source in report.header_alpha.scales.values()}
    texts = [
        f"{_range(alpha for alpha, _ in found)} from {source}"
        f" ({_range(scale for _, scale in found)} times the product)"
        + ("" if report.use_header_alpha or source not in skipped else ", not applied")
        for source, found in report.alphas.items()
    ]
    return "; ".join([*texts, *report.header_alpha.notes])


def _range(numbers: Iterable[float]) -> str:
    """Returns '8', or '4 to 16'."""
    ordered = sorted(numbers)
    return " to ".join(dict.fromkeys(f"{number:.4g}" for number in (ordered[0], ordered[-1])))


def _list_lines(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    lines = ["", title, *(f"  {entry}" for entry in entries[:EXAMPLES])]
    if entries[EXAMPLES:]:
        lines.append(f"  … and {len(entries) - EXAMPLES} more")
    return lines


def percent_text(share: float) -> str:
    """Returns a share with two significant digits: '12 %', '1.8 %', '0.043 %'."""
    value = 100 * share
    if value <= 0:
        return "0 %"
    digits = max(0, min(4, 1 - math.floor(math.log10(min(value, 1e9)))))
    return f"{value:.{digits}f} %"
