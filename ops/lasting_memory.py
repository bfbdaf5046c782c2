"""Device memory that stays allocated when the block of a model that runs is done.

From ComfyUI 0.38 on, the host may record the allocations of a block and repeat them, and ends the
process where one of them outlives the block.
"""
import contextlib
import functools
import sys
from collections.abc import Callable
from typing import TypeVar

_Made = TypeVar("_Made")


def lasting_memory() -> contextlib.AbstractContextManager:
    """Returns a context whose allocations the host does not record."""
    # formats and kernels run without the host too
    pause = getattr(sys.modules.get("comfy.model_prefetch"), "pause_malloc_graph", None)
    return contextlib.nullcontext() if pause is None else pause()


def cached_on_device(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """Decorator: keeps the results of a function that allocates memory on a device."""
    @functools.cache
    @functools.wraps(make)
    def make_once(*args):
        with lasting_memory():
            return make(*args)

    return make_once
