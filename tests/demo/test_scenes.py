"""The pictures that the model learns, and the judge that says what a picture shows."""
import itertools
import random

import numpy as np
import pytest

from demo_model import judge, scenes
from demo_model.scenes import CHOICES, Scene

TRAINED, HELD_OUT = scenes.all_scenes()
PLAIN = Scene("red", "left", "oak", "grass", "noon", "sun")


def test_held_out_scenes_are_never_trained_but_every_pair_of_choices_is():
    assert len(HELD_OUT) == 256 and not set(HELD_OUT) & set(TRAINED)
    assert len(HELD_OUT) + len(TRAINED) == np.prod([len(values) for values in CHOICES.values()])
    shown = {pair for scene in TRAINED for pair in itertools.combinations(vars(scene).items(), 2)}
    assert shown == {
        pair
        for scene in HELD_OUT + TRAINED
        for pair in itertools.combinations(vars(scene).items(), 2)
    }


@pytest.mark.parametrize("first", range(7))
def test_the_judge_reads_every_drawn_picture_right(first):
    chance = random.Random(first)
    for scene in (TRAINED + HELD_OUT)[first::35]:
        assert judge.choices_in(scenes.draw(scene, chance)) == vars(scene)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wall", "blue"),
        ("side", "right"),
        ("tree", "palm"),
        ("ground", "snow"),
        ("hour", "night"),
        ("body", "moon"),
    ],
)
def test_the_judge_sees_one_wrong_choice(field, value):
    picture = scenes.draw(Scene(**vars(PLAIN) | {field: value}), random.Random(0))
    assert judge.right(picture, vars(PLAIN)) == {name: name != field for name in vars(PLAIN)}


def test_the_judge_finds_nothing_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (scenes.SIZE, scenes.SIZE, 3), dtype=np.uint8)
    shown = judge.choices_in(noise)
    assert shown["tree"] is None and shown["body"] is None


def test_what_the_loras_add_is_measured():
    pictures = {name: scenes.draw(PLAIN, random.Random(0), **options) for name, options in (
        ("plain", {}), ("ink", {"outline": True}), ("pumpkins", {"pumpkins": True}))}
    outlines = {name: judge.outlines(picture) for name, picture in pictures.items()}
    pumpkins = {name: judge.pumpkins(picture) for name, picture in pictures.items()}
    assert (
        outlines["ink"] > 4 * outlines["plain"]
        and pumpkins["plain"] == 0
        and pumpkins["pumpkins"] > 200
    )


def test_a_caption_says_all_choices_and_a_prompt_is_read_back():
    assert PLAIN.caption() == "a red house left of an oak tree on grass at noon under a sun"
    assert scenes.asked_for(PLAIN.caption()) == vars(PLAIN)
    assert scenes.asked_for("A blue house, at NIGHT. And red.") == {"wall": "blue", "hour": "night"}
