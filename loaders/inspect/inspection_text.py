"""Formats an inspection as text."""
import collections

from ..byte_sizes import size_text, type_lines
from ..packing.layer_losses import LOSS_IN_LAYERS, WEIGHTS, loss_text, percent, total
from .identify import ENCODER, Inspection, weight_block

WORST_TENSORS = 5  # listed with their errors
NAMES = ("file says", "ComfyUI's name")  # properties that a node has no room for


def summary(inspection: Inspection) -> str:
    """Returns the text next to the chart, which has the types, cards and errors itself."""
    if inspection.problem:
        return inspection.problem
    lines = [inspection.title, *_warning_lines(inspection), *_about_lines(inspection, NAMES),
             *errors_lines(inspection)[:1]]
    return "\n".join(lines)


def inspection_text(inspection: Inspection) -> str:
    """Returns the report: a sentence, then lines about types, cards and the largest errors."""
    if inspection.problem:
        return inspection.problem
    lines = [inspection.title, *_warning_lines(inspection), "", *_about_lines(inspection), "",
             *type_lines(inspection.types)]
    if inspection.cards:
        lines += ["", cards_title(inspection)]
        lines += [f"  {note}" for _, note in cards_notes(inspection)]
    for key, text in inspection.plan.items():
        lines += ["", f"made here, {key}: {text}"]
    if inspection.reference:
        lines += ["", *errors_lines(inspection)]
    return "\n".join(lines)


def _warning_lines(inspection: Inspection) -> list[str]:
    return [f"warning: {warning}" for warning in inspection.warnings]


def _about_lines(inspection: Inspection, omitted: tuple[str, ...] = ()) -> list[str]:
    """Returns a line `name: value` for each known property of the whole model."""
    rows = {
        "file says": inspection.declared_type,
        "ComfyUI's name": inspection.host,
        "packed by": inspection.quantizer,
        "parameters": _parameters_text(inspection),
        "size": size_text(inspection.nbytes) if inspection.nbytes else "",
        "in memory": size_text(inspection.memory_bytes),
        "kernels": inspection.kernels,
    }
    if inspection.parts:
        parts = [f"{part} {size_text(size)}" for part, size in inspection.parts.items()]
        rows["in it"] = ", ".join(parts)
    if inspection.patches:
        rows["patched"] = (
            f"{inspection.patches} weights are changed by LoRAs or merges, whose bytes are not"
            " counted")
    for what, which in inspection.needs.items():
        rows["use" if what == "use" else f"needs {what}"] = which
    return [f"{name}: {value}" for name, value in rows.items() if value and name not in omitted]


def _parameters_text(inspection: Inspection) -> str:
    count = sum(tensors for tensors, _ in inspection.types.values())
    number = (
        f"{inspection.parameters / 1e9:.2f} billion"
        if inspection.parameters >= 1e9
        else f"{inspection.parameters / 1e6:.2f} million"
    )
    return f"{number} in {count} tensors"


def cards_title(inspection: Inspection) -> str:
    """Returns the title of the lines about cards: what the memory is estimated for."""
    if inspection.model_type == ENCODER:
        return "memory, where it runs before the model:"
    return f"memory for {inspection.resolution}, text encoders and VAE not counted:"


def cards_notes(inspection: Inspection) -> list[tuple[bool, str]]:
    """Returns (whether it fits whole, a line) for the cards, one line for cards with equal text."""
    sizes_by_text: dict[tuple[bool, str], list[int]] = {}
    for card in inspection.cards:
        text = (
            f"{size_text(card.missing)} of it stay in the computer's memory"
            if card.missing
            else "fits"
        )
        if card.fit:
            text += f"; fit this GPU, without int8: {card.fit}"
        sizes_by_text.setdefault((not card.missing, text), []).append(card.gib)
    return [
        (fits, f"{'cards' if sizes[1:] else 'card'} of {', '.join(map(str, sizes))} GB: {text}")
        for (fits, text), sizes in sizes_by_text.items()
    ]


def errors_lines(inspection: Inspection) -> list[str]:
    """Returns lines with the loss against the reference and the tensors with the largest errors.

    A file that was packed for the inputs of its layers has no loss of all weights together.
    """
    if not inspection.reference:
        return []
    if not inspection.errors:
        return [f"loss against {inspection.reference}: not measured. {inspection.no_errors}"]
    lossy = {name: error ** 2 for name, error in inspection.errors.items() if error}
    loss = loss_text(total(lossy, WEIGHTS), WEIGHTS) if lossy else "none"
    if "loss" in inspection.plan:
        loss = LOSS_IN_LAYERS
    worst = sorted(inspection.errors.items(), key=lambda item: -item[1])[:WORST_TENSORS]
    return [
        f"loss against {inspection.reference}, in {len(lossy)} of {len(inspection.errors)} tensors:"
        f" {loss}",
        *(f"  {name}: {error_text(error)}" for name, error in worst)
    ]


def error_text(error: float) -> str:
    """Returns a relative error in percent, "exact" for 0."""
    return "exact" if error == 0 else percent(error ** 2)


def block_errors(inspection: Inspection) -> dict[str, float]:
    """Returns block -> relative error of its tensors together."""
    shares: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for name, error in inspection.errors.items():
        shares[weight_block(name)][name] = error ** 2
    return {block: total(of_block, WEIGHTS) ** 0.5 for block, of_block in shares.items()}
