"""What `dev.py soak` does for hours, for half a minute: repeated pictures are equal, no prompt is
lost, nothing is left."""
import pytest

from devtools.soak import fixtures
from devtools.soak.run import GROWTH, soak

pytestmark = pytest.mark.not_on_fake_gpus(reason="it measures the memory of a server on the CPU")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("soak")
    fixtures.write(base)
    return base


@pytest.mark.heavy
def test_some_prompts_of_every_kind(base):
    run_log = soak(base, prompts=24, minutes=15, every=8, seed=1)  # of which each kind has one
    assert run_log.broken() == []
    assert run_log.prompts == 24 and run_log.repeated and len(run_log.readings) == 3
    assert run_log.readings[-1]["mapped"] == run_log.readings[-1]["temporary"] == 0


@pytest.mark.heavy
def test_two_thousand_prompts(base):
    run_log = soak(base, prompts=2000, minutes=120, every=50, seed=2)
    assert run_log.broken() == []
    assert run_log.growth() < GROWTH
