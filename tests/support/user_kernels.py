"""Runs tests with the kernels that a user has, where all others take torch, and what these share
with torch."""
import contextlib

import pytest

from featherweight.ops import kernels
from featherweight.ops.kernels.decider import Decider
from featherweight.ops.kernels.waiting import host

MEET = Decider.meet
undecided: list[str] = []  # cases that steps needed and no load had decided


def forget_decisions(monkeypatch):
    """Has this process decide on kernels as a new one does, and `undecided` count."""
    undecided.clear()
    monkeypatch.setattr(kernels, "_deciders", {})
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(Decider, "meet", lambda decider, case: (
        undecided.append(f"{case} on {decider.device}"), MEET(decider, case)))


def verdicts_on(device) -> list[str]:
    """On each kernel of a device that was checked."""
    return [line["verdict"] for line in kernels._deciders[device]._lines.values()]


def put_back_host(monkeypatch):
    """Has what a test puts into `waiting.host` put back after it."""
    for name, function in vars(host).items():
        monkeypatch.setattr(host, name, function)


@contextlib.contextmanager
def kernels_of_this_machine():
    """Inside this block servers that start have them, and so has what is packed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.VARIABLE, raising=False)
        forget_decisions(patch)
        yield


@contextlib.contextmanager
def without_kernels():
    """For what tests of both kinds, or two processes, share: kernels break ties in other ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "torch")
        forget_decisions(patch)
        yield
