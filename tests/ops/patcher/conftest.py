"""Fake GPUs for the tests of what lies on a GPU."""
import pytest


@pytest.fixture
def gpu(one_thread):
    """Yields the counters of GPUs that hold no model before and after."""
    from gpu_memory import empty_gpus

    with empty_gpus() as counters:
        yield counters
