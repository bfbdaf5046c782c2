"""What a soak asks for follows from the seed, and a bound that is broken is told."""
import pytest

from devtools.soak.requests import Asks
from devtools.soak.run import RunLog


def readings(**last) -> list[dict]:
    """Twenty at rest; of what is named the value at the end, to which it grows from the warm-up
    on."""
    rest = {"rss": 800.0, "mapped": 0, "open": 7, "temporary": 0}
    return [{"prompts": 50 * number, **rest,
             **{name: type(rest[name])(rest[name] + (value - rest[name]) * max(0, number - 5) / 14)
                for name, value in last.items()}}
            for number in range(20)]


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ({}, ""),
        ({"rss": 803}, ""),
        ({"rss": 840}, "Resident memory has grown by"),
        ({"open": 40}, "open files: 7 after"),
        ({"mapped": 3}, "model files mapped: 0 after"),
        ({"temporary": 9}, "temporary files: 0 after"),
    ],
)
def test_a_bound_that_is_broken_is_told_in_a_sentence(last, says):
    run_log = RunLog(readings=readings(**last))
    assert "".join(run_log.broken())[:len(says) or None] == says
    assert run_log.closing_line().startswith("Failed: " if says else "Done: ")


def test_a_picture_that_changes_back_or_too_often_is_a_mistake(tmp_path):
    ask, run_log = next(Asks(tmp_path, seed=1, client=0)), RunLog()
    for digest in ("a", "a", "b"):  # kernels were proven meanwhile
        assert not run_log.picture(ask, digest)
    assert "another picture" in run_log.picture(ask, "a") and run_log.repeated == 3


def test_the_seed_decides_what_is_asked_for(tmp_path):
    def asked(seed):
        asks = Asks(tmp_path, seed, client=0)
        return [next(asks) for _ in range(80)]

    keys = [ask.key for ask in asked(1)]
    assert keys == [ask.key for ask in asked(1)] != [ask.key for ask in asked(2)]
    assert len(set(keys)) < len(keys)  # some are asked for again
    classes = {node["class_type"] for ask in asked(1) for node in ask.graph.values()}
    assert any(name.startswith("Featherweight") for name in classes)
