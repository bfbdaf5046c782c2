"""What is said of losses: a word, a figure in per cent, of what; and the layers that lose most."""
import math
import random
import re

import pytest

from featherweight.loaders.packing.layer_losses import (
    IMATRIX,
    LAYERS,
    RESULT,
    WEIGHTS,
    WORDS,
    layer_lines,
    loss_sentences,
    loss_text,
    percent,
    total,
)

SENTENCES = {
    RESULT: r"Expected error of the result: ([a-z ]+) \((\S+) % of its latents\)\.",
    IMATRIX: r"Loss by the imatrix: ([a-z ]+) \((\S+) % of the weights by their importance\)\.",
    WEIGHTS: r"Loss: ([a-z ]+) \((\S+) % of the weights\)\."
}
each_loss = pytest.mark.parametrize("what", SENTENCES)
each_kind = pytest.mark.parametrize("what", [*SENTENCES, LAYERS])


@pytest.mark.parametrize(("error", "text"), [
    (0.0072, "very small (0.72 % of the weights)"), (0.02, "very small (2 % of the weights)"),
    (0.0704, "small (7 % of the weights)"), (0.137, "noticeable (14 % of the weights)"),
    (0.26, "large (26 % of the weights)"), (1.5, "large (150 % of the weights)")])
def test_a_loss_has_a_word_and_a_figure(error, text):
    assert loss_text(error ** 2, WEIGHTS) == text


def test_the_words_are_in_one_table_from_the_least_to_any():
    limits = [limit for limit, _ in WORDS]
    assert limits == sorted(limits) and limits[-1] == math.inf
    for limit, word in WORDS[:-1]:
        assert loss_text((limit * 0.999) ** 2, RESULT).startswith(f"{word} (")
        assert not loss_text((limit * 1.001) ** 2, RESULT).startswith(f"{word} (")


def shares_of_layers() -> dict[str, float]:
    return {f"double_blocks.{block}.{kind}.weight": random.uniform(1e-6, 1e-3)
            for block in range(random.randint(3, 6))
            for kind in ("img_mlp.0", "img_mlp.2", "txt_attn.qkv")}


@each_loss
def test_errors_of_the_result_add_up_and_losses_of_weights_are_their_mean(what):
    shares = shares_of_layers()
    values = {name: random.randint(1, 100) for name in shares}
    together = sum(shares.values())
    if what != RESULT:
        together = sum(shares[name] * values[name] for name in shares) / sum(values.values())
    assert total(shares, what, values) == pytest.approx(together)
    sentence, = loss_sentences(shares, what, values)
    told = re.fullmatch(SENTENCES[what], sentence)
    assert told and float(told[2]) == pytest.approx(100 * math.sqrt(together), rel=0.06)
    others = [pattern for other, pattern in SENTENCES.items() if other != what]
    assert not any(re.fullmatch(pattern, sentence) for pattern in others)


def test_losses_of_layers_by_themselves_have_no_sentence_on_all():
    shares = shares_of_layers()
    assert loss_sentences(shares, LAYERS, dict.fromkeys(shares, 1)) == []


@each_kind
def test_the_worst_layers_and_kinds_of_layers_are_named_with_their_share(what):
    shares = shares_of_layers()
    layers, kinds = layer_lines(shares, what)
    groups = {}
    for name, share in shares.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(share)
    groups = {name: sum(values) / (1 if what == RESULT else len(values))
              for name, values in groups.items()}
    assert layers.startswith(f"The layers that lose the most, in % {what}: ")
    for line, expected in ((layers, shares), (kinds, groups)):
        told = re.findall(r"(\S+) ([\d.]+)(?:, |$)", line.partition(": ")[2])
        assert [f"{name}.weight" for name, _ in told] == sorted(
            expected, key=expected.__getitem__, reverse=True)[:5]
        assert [f"{value} %" for _, value in told] == [
            percent(expected[f"{name}.weight"]) for name, _ in told]


@each_kind
def test_without_errors_nothing_is_said(what):
    assert loss_sentences({}, what, {}) == layer_lines({}, what) == []
