"""What a file name says between percent signs, filled in as the editor does."""
import datetime
import random

import pytest

from featherweight.loaders.paths import name_tokens
from featherweight.loaders.paths.name_tokens import fill_in

PROMPT = {
    "1": {"class_type": "KSampler", "inputs": {"seed": 42, "model": ["2", 0], "name": "a/b:c"},
          "_meta": {"title": "My sampler"}},
    "2": {"class_type": "Other", "inputs": None}, "3": "no node"}


@pytest.fixture
def now(monkeypatch):
    """A moment at random, which the module takes for now."""
    rng = random.Random()
    moment = datetime.datetime(rng.randint(1970, 2100), rng.randint(1, 12), rng.randint(1, 28),
                               rng.randint(0, 23), rng.randint(0, 59), rng.randint(0, 59))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr(name_tokens.datetime, "datetime", Clock)
    return moment


def test_dates_are_those_of_the_run(now):
    assert fill_in("a/%date:yyyy-MM-dd%_x", "m") == now.strftime("a/%Y-%m-%d_x")
    assert fill_in("%date:hhmmss%%date:yy%", "m") == now.strftime("%H%M%S%y")
    assert fill_in("%date:d.M.yyyy h:m:s%", "m") == (
        f"{now.day}.{now.month}.{now.year} {now.hour}_{now.minute}_{now.second}")


@pytest.mark.parametrize(("name", "filled"), [
    ("models/%model%_v2", "models/flux dev_v2"),
    ("%KSampler.seed%", "42"), ("%My sampler.seed%", "42"),
    ("%KSampler.name%", "a_b_c"),  # which leads into no folder
    ("%KSampler.model%", "%KSampler.model%"), ("%KSampler.none%", "%KSampler.none%"),
    ("%Nobody.seed%", "%Nobody.seed%"), ("%Other.seed%", "%Other.seed%"),
    ("%year%-%width%", "%year%-%width%"), ("100%", "100%"), ("%%", "%%")])
def test_a_token_becomes_its_value_and_others_stay(name, filled):
    assert fill_in(name, "flux dev", PROMPT) == filled


def test_without_a_prompt_inputs_stay():
    assert fill_in("%KSampler.seed%_%model%", "m") == "%KSampler.seed%_m"
