"""Hypothesis's test of a target. What it draws is read in a process of its own, under the guard."""
import contextlib
import faulthandler
import functools
import hashlib
import importlib
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import Phase
from hypothesis import strategies as st

from devtools import ROOT

CORPUS = ROOT / "tests" / "fuzz" / "corpus"  # inputs that once broke something
FOUND = ROOT / ".dev" / "fuzz"
STARTS = 600  # seconds, after which a process that starts or makes a target's samples is ended
HANGS = 30  # seconds, after which one that reads an input is ended; the machine may be busy


class FindingError(Exception):
    """An input broke a rule."""


@functools.cache
def error_class(kind: str, where: str) -> type[FindingError]:
    """Returns a class for each finding: Hypothesis distinguishes errors by their classes."""
    return type("FindingError", (FindingError,), {})


class Reader:
    """A process that reads inputs of one target at a time, alive inside a `with` block.

    Args:
        folder: what the targets may touch goes into it.
        module: the one that has `TARGETS`.

    Attributes:
        failing: the last input that broke a rule.
        fatal: the finding with which that input ended the process.
    """

    def __init__(self, folder: Path, module: str = "devtools.fuzz.targets", hangs: float = HANGS):
        self.folder, self.module, self.hangs = folder, module, hangs
        self.process: Any = None
        self.failing, self.fatal = None, None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def open(self, name: str) -> st.SearchStrategy[bytes]:
        """Makes a target the one that is read. Returns the strategy of its inputs."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(
                target=_serve, args=(other, self.folder, self.module), daemon=True)
            self.process.start()
            other.close()
        self.failing, self.fatal = None, None
        samples, changes, longest = self._ask(name, STARTS)
        return st.sampled_from(samples).flatmap(changes).map(lambda data: data[:longest])

    def read(self, data: bytes):
        """Reads an input; raises FindingError if it breaks a rule."""
        # one that ends the process is not made smaller: each try would take another process
        if self.fatal is None:
            found = self._ask(data, self.hangs)
        else:
            found = self.fatal if data == self.failing else None
        if found is not None:
            self.failing, (key, text) = data, found
            raise error_class(*key)(text)

    def _ask(self, question: str | bytes, seconds: float) -> Any:
        """Returns the answer of the process, or with which finding it ended."""
        try:
            self.connection.send(question)
            if self.connection.poll(seconds):
                return self.connection.recv()
            text = f"hangs, it was ended after {seconds} s"
        except (EOFError, OSError):
            self.process.join()
            text = f"the process ended with {self.process.exitcode}"
        self.__exit__()
        if isinstance(question, str):
            raise FindingError(f"{question}, before an input was read: {text}")
        self.fatal = ("ended", ""), text
        return self.fatal


def fuzz(reader: Reader, name: str, inputs: int, seed: int, past: Sequence[Path] = (),
         found: Path = FOUND):
    """Reads past findings of a target, then inputs that Hypothesis draws.

    Args:
        found: folder for an input that breaks a rule, as small as Hypothesis can make it.

    Raises:
        AssertionError: An input broke a rule.
    """
    test = hypothesis.given(data=reader.open(name))(lambda data: reader.read(data))
    for path in past:
        test = hypothesis.example(data=path.read_bytes())(test)
    test = hypothesis.seed(seed)(hypothesis.settings(
        max_examples=inputs, deadline=None, database=None, print_blob=False,
        report_multiple_bugs=False, verbosity=hypothesis.Verbosity.quiet,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck))(test))  # pyright: ignore[reportArgumentType]
    try:
        test()  # pyright: ignore[reportCallIssue]
    except Exception as error:
        if reader.failing is None:
            raise
        path = found / name / hashlib.sha256(reader.failing).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.failing)
        raise AssertionError(f"{error}\nThe input is {path}. Copied to {CORPUS / name}, it is read"
                             " by every test run.") from None


def _serve(connection, folder: Path, module: str):
    """Answers the name of a target with its inputs, and each input with its finding or None."""
    os.environ["FEATHERWEIGHT_KERNELS"] = "torch"  # nothing is compiled and tried beside it
    importlib.import_module("devtools.measure")  # the host and the pack
    import torch

    from .guard import Guard

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    targets, guard, target = importlib.import_module(module).TARGETS, Guard(), None
    while True:
        try:
            question = connection.recv()
        except EOFError:  # the parent has ended
            return
        if isinstance(question, str):
            work = folder / f"{question} {len(os.listdir(folder))}"
            work.mkdir()
            target = targets[question].make(work)
            for data in target.samples:  # imports what is imported when it is first needed
                given = target.lay_out(data)
                with contextlib.suppress(Exception):
                    target.read(given)
                target.clear()
            guard.settle()
            connection.send((list(target.samples), target.changes, target.longest))
        else:
            assert target is not None
            finding = guard.run(target, question)
            connection.send(finding and (
                finding.key, f"{finding.kind}, {finding.where}: {finding.text}"))
