"""What was found out about a model, as a text for people."""
import collections

from ..sizes import size_text, type_lines
from .inspection import ENCODER, Inspection, block_name

WORST = 5  # tensors named with their errors


def summary(found: Inspection) -> str:
    """A sentence and a few lines, for a node whose picture shows the types, the cards and the
    errors of each block."""
    if found.problem:
        return found.problem
    return "\n".join([found.title, *_about_lines(found), *errors_lines(found)[:1]])


def inspection_text(found: Inspection) -> str:
    """A sentence, then a line for each thing that is known, each type, card and the largest
    errors."""
    if found.problem:
        return found.problem
    lines = [found.title, "", *_about_lines(found), "", *type_lines(found.types)]
    if found.cards:
        lines += ["", cards_title(found), *(f"  {note}" for _, note in cards_notes(found))]
    lines += [
        line for what, said in found.plan.items() for line in ("", f"made here, {what}: {said}")
    ]
    if found.reference:
        lines += ["", *errors_lines(found)]
    return "\n".join(lines)


def _about_lines(found: Inspection) -> list[str]:
    """A line `name: value` for each thing that is known of the whole."""
    rows = {
        "file says": found.declared_type, "ComfyUI's name": found.host, "parameters": _parameters(found),
        "size": size_text(found.nbytes) if found.nbytes else "",
        "held in memory": size_text(found.memory_bytes)
    }
    if found.parts:
        rows["in it"] = ", ".join(f"{part} {size_text(size)}" for part, size in found.parts.items())
    if found.patches:
        rows[
            "patched"] = f"{found.patches} weights are changed by LoRAs or merges, which lie beside them and are not counted"
    rows |= {
        f"needs {what}" if what != "use" else what: which for what, which in found.needs.items()
    }
    return [f"{name}: {value}" for name, value in rows.items() if value]


def _parameters(found: Inspection) -> str:
    count = sum(tensors for tensors, _ in found.types.values())
    number = (
        f"{found.parameters / 1e9:.2f} billion"
        if found.parameters >= 1e9
        else f"{found.parameters / 1e6:.2f} million"
    )
    return f"{number} in {count} tensors"


def cards_title(found: Inspection) -> str:
    """What the memory is counted for."""
    if found.model_type == ENCODER:
        return "memory, where it runs before the model:"
    return f"memory for {found.resolution}, text encoders and VAE not counted:"


def cards_notes(found: Inspection) -> list[tuple[bool, str]]:
    """(whether it fits whole, a sentence) of the cards, those with the same sentence in one."""
    said = {}
    for card in found.cards:
        fits = (
            f"{size_text(card.missing)} of it stay in the computer's memory"
            if card.missing
            else "fits whole"
        )
        if card.best is not None:
            fits += f"; largest type that fits whole: {card.best or 'none'}"
        said.setdefault((not card.missing, fits), []).append(card.gib)
    return [(whole, f"card{'s' * (len(sizes) > 1)} of {', '.join(map(str, sizes))} GB: {line}")
            for (whole, line), sizes in said.items()]


def errors_lines(found: Inspection) -> list[str]:
    """The relative errors against the reference: the mean, and the tensors with the largest. None
    without a reference."""
    if not found.reference:
        return []
    if not found.errors:
        return [f"error against {found.reference}: not measured. {found.no_errors}"]
    mean = sum(found.errors.values()) / len(found.errors)
    worst = sorted(found.errors.items(), key=lambda item: -item[1])[:WORST]
    return [
        f"error against {found.reference}, mean over {len(found.errors)} tensors:"
        f" {error_text(mean)}",
        *(f"  {name}: {error_text(error)}" for name, error in worst)
    ]


def error_text(error: float) -> str:
    """A relative error in percent; "exact" where there is none."""
    return "exact" if error == 0 else f"{100 * error:.2g} %"


def block_errors(found: Inspection) -> dict[str, float]:
    """Block -> mean relative error of its tensors."""
    of_block = collections.defaultdict(list)
    for name, error in found.errors.items():
        of_block[block_name(name)].append(error)
    return {block: sum(errors) / len(errors) for block, errors in of_block.items()}
