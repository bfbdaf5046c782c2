"""The captions that the model learns."""
import itertools

import numpy as np

from demo_model import scenes
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


def test_a_caption_says_all_choices_and_a_prompt_is_read_back():
    assert PLAIN.caption() == "a red house left of an oak tree on grass at noon under a sun"
    assert scenes.asked_for(PLAIN.caption()) == vars(PLAIN)
    assert scenes.asked_for("A blue house, at NIGHT. And red.") == {"wall": "blue", "hour": "night"}
