"""Runs tests with the kernels that a user has, where all others take torch, and what these share
with torch."""
import contextlib

import pytest

from featherweight.ops import kernels


@contextlib.contextmanager
def kernels_of_this_machine():
    """Inside this block servers that start have them, and so has what is packed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        patch.setattr(kernels, "_selectors", {})
        yield


@contextlib.contextmanager
def without_kernels():
    """For what tests of both kinds, or two processes, share: kernels break ties in other ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "torch")
        patch.setattr(kernels, "_selectors", {})
        yield
