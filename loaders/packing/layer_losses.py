"""Says what packing loses, in words and per cent: of the result where a measurement has that."""
import math
import re
from collections.abc import Iterable, Mapping

WORST = 5  # layers that are named, and groups of layers of the same name in other blocks
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# (error over signal, word): the first that is no less than an error
WORDS = ((0.02, "very small"), (0.1, "small"), (0.2, "noticeable"), (math.inf, "large"))
# What a loss is a share of. Losses of two kinds do not compare, and those of single layers do not
# show which of two files gives better images: they have no sentence.
RESULT, WEIGHTS = "of its latents", "of the weights"
LAYERS, IMATRIX = "of what the layer computes", "of the weights by their importance"
SENTENCES = {
    RESULT: "Expected error of the result: {}.", IMATRIX: "Loss by the imatrix: {}.",
    WEIGHTS: "Loss: {}."
}
# What a file says that was packed for the inputs of its layers, where it has no expected error: its
# weights may lose more than those of another file that gives worse images.
LOSS_KEY, LOSS_IN_LAYERS = "featherweight.loss", "least in the layers, not in the weights"


def measuring_advice(share: float, seconds: float | None = None) -> str:
    """Returns the advice to measure a model, "" where the loss is very small.

    Args:
        share: power of the error over that of the weights.
        seconds: that it is estimated to take, None where that is not known.
    """
    if math.sqrt(share) <= WORDS[0][0]:
        return ""
    text = ("With Measure Sensitivity (Featherweight) first, the same size loses less: under half"
            " with a small model")
    if seconds is None:
        return f"{text}."
    minutes = max(1, round(seconds / 60))
    return f"{text}. It takes about {minutes} min (estimate)."


def percent(share: float) -> str:
    """Returns an error in per cent of its signal, for its power over that of the signal."""
    error = 100 * math.sqrt(share)
    return f"{error:.2g} %" if error < 10 else f"{error:.0f} %"


def loss_text(share: float, what: str) -> str:
    """Returns a loss such as "small (7 % of the weights)".

    Args:
        share: power of the error over that of what it is an error of.
        what: RESULT, WEIGHTS or IMATRIX.
    """
    word = next(word for most, word in WORDS if math.sqrt(share) <= most)
    return f"{word} ({percent(share)} {what})"


def loss_sentences(shares: Mapping[str, float], what: str,
                   values: Mapping[str, int]) -> list[str]:
    """Returns the sentence on all of a model's packed weights, or nothing for single layers.

    Args:
        shares: name of a weight -> power of the error that it causes, over that of the signal.
        what: RESULT, WEIGHTS, LAYERS or IMATRIX.
        values: name -> number of its values.
    """
    if not shares or what not in SENTENCES:
        return []
    return [SENTENCES[what].format(loss_text(total(shares, what, values), what))]


def layer_lines(shares: Mapping[str, float], what: str) -> list[str]:
    """Returns short lines: the worst layers, and the worst groups; args as `loss_sentences`."""
    if not shares:
        return []
    groups: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        groups.setdefault(NUMBER.sub("*", name, count=1), {})[name] = share
    lines = [f"The layers that lose the most, in % {what}: {_worst(shares)}"]
    if 1 < len(groups) < len(shares):
        totals = {group: total(members, what) for group, members in groups.items()}
        lines.append(f"The same by kind of layer: {_worst(totals)}")
    return lines


def total(shares: Mapping[str, float], what: str,
          values: Mapping[str, int] | None = None) -> float:
    """Returns the share that all have together: errors of the result add up, others are a mean.

    Args:
        shares, what: as for `loss_sentences`.
        values: the same; None: each counts alike.
    """
    if what == RESULT or not shares:
        return sum(shares.values())
    counts = values or dict.fromkeys(shares, 1)
    return sum(share * counts[name] for name, share in shares.items()) / sum(
        counts[name] for name in shares)


def _worst(shares: Mapping[str, float]) -> str:
    names: Iterable[str] = sorted(shares, key=shares.__getitem__, reverse=True)[:WORST]
    return ", ".join(f"{name.removesuffix('.weight')} {percent(shares[name])[:-2]}"
                     for name in names)
