"""Models for the tests of the patcher, and fake GPUs for those of what lies on a GPU."""
import pytest
from patcher_models import models  # noqa: F401


@pytest.fixture
def gpu(one_thread):
    """Yields the counters of GPUs that hold no model before and after."""
    from gpu_memory import empty_gpus

    with empty_gpus() as counters:
        yield counters
