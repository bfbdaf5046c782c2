"""Targets in this process, under the guard.

    python -m devtools.fuzz.worker TARGET FOLDER SECONDS EXECUTIONS SEED
    python -m devtools.fuzz.worker --replay EXECUTIONS < JOB

The first reads inputs that Hypothesis changes. The first input that breaks a rule ends the process
with an exit status that is not 0. FOLDER gets `current`, the input that is being read or, at the
end, the smallest one that broke a rule; `counts.json`; and `examples`, Hypothesis's database.

The second reads what is in files, and EXECUTIONS new inputs. JOB is JSON, target -> paths. It
prints a line of JSON before each input, {"target", "input"}, and one with "finding" after each that
broke a rule.
"""
import contextlib
import faulthandler
import functools
import json
import logging
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path

os.environ["FEATHERWEIGHT_KERNELS"] = "torch"  # nothing is compiled and tried beside what is read

import devtools.measure  # noqa: F401  the host and the pack

import hypothesis
import torch
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from .__main__ import HANGS
from .guard import Guard
from .targets import TARGETS

ROUND = 200  # executions, after which Hypothesis begins anew


class FindingError(Exception):
    """An input broke a rule."""


@functools.cache
def error_class(kind: str, where: str) -> type[FindingError]:
    """Returns a class for each finding: Hypothesis distinguishes errors by their classes."""
    return type("FindingError", (FindingError,), {})


class Reader:
    """Reads inputs of one target under the guard.

    Args:
        folder: what the target may touch goes into it.
        kept: folder for `current` and `counts.json`, or None.

    Attributes:
        executions: how many inputs were read.
        outcomes: what they came to: (), or the lines in which an error was raised.
        failing: the last input that broke a rule.
    """

    def __init__(self, name: str, folder: Path, guard: Guard, kept: Path | None = None):
        work = folder / name
        work.mkdir()
        self.guard, self.target, self.kept = guard, TARGETS[name].make(work), kept
        self.executions, self.outcomes, self.failing, self.told = 0, set(), None, 0.0
        for data in self.target.samples:  # imports what is imported when it is first needed
            given = self.target.lay_out(data)
            with contextlib.suppress(Exception):
                self.target.read(given)
            self.target.clear()
        guard.settle()

    def read(self, data: bytes):
        """Reads an input; raises FindingError if it breaks a rule."""
        data = data[:self.target.longest]
        if self.kept is not None:
            (self.kept / "current").write_bytes(data)
        if time.monotonic() > self.told + 1:
            self.tell()
        found = self.guard.run(self.target, data)
        self.executions += 1
        self.outcomes.add(self.guard.outcome)
        if found is not None:
            self.failing = data
            self.tell()
            raise error_class(*found.key)(f"{found.kind}, {found.where}: {found.text}")

    def tell(self):
        """Writes the counts, and gives the next inputs their time."""
        self.told = time.monotonic()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        if self.kept is not None:
            (self.kept / "counts.json").write_text(json.dumps(
                {"executions": self.executions, "outcomes": len(self.outcomes)}))

    def test(self, seed: int | None = None, database: ExampleDatabase | None = None, **settings):
        """Returns Hypothesis's test of changed inputs; one with a seed takes no database."""

        @hypothesis.settings(
            deadline=None, report_multiple_bugs=False, print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
            database=database, **settings)
        @hypothesis.given(st.sampled_from(self.target.samples).flatmap(self.target.changes))
        def test(data):
            self.read(data)

        return test if seed is None else hypothesis.seed(seed)(test)


def fuzz(name: str, kept: Path, seconds: float, executions: int, seed: int, folder: Path):
    """Reads changed inputs; an error or the end of the process is a finding."""
    reader = Reader(name, folder, Guard(), kept)
    kept_test = reader.test(database=DirectoryBasedExampleDatabase(kept / "examples"),
                            phases=[Phase.reuse, Phase.shrink])
    end = time.monotonic() + seconds
    try:
        with contextlib.suppress(unittest.SkipTest):  # where no example is kept
            kept_test()
        while time.monotonic() < end and reader.executions < executions:
            reader.test(seed, max_examples=ROUND)()
            seed += 1
    finally:
        reader.tell()
        if reader.failing is not None:
            (kept / "current").write_bytes(reader.failing)


def replay(files: dict[str, list[str]], executions: int, folder: Path):
    """Reads files, and new inputs of each target."""
    guard = Guard()

    def tell(**line):
        print(json.dumps(line), flush=True)

    for name, paths in files.items():
        reader = Reader(name, folder, guard)
        for path in paths:
            tell(target=name, input=path)
            try:
                reader.read(Path(path).read_bytes())
            except FindingError as finding:
                tell(target=name, finding=str(finding))
        tell(target=name, input="new")
        try:
            if executions:
                reader.test(1, max_examples=executions, phases=[Phase.generate])()
        except FindingError as finding:
            tell(target=name, finding=str(finding))


def main(arguments: list[str]):
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        match arguments:
            case ["--replay", executions]:
                replay(json.load(sys.stdin), int(executions), Path(folder))
            case [name, kept, seconds, executions, seed]:
                fuzz(name, Path(kept), float(seconds), int(executions), int(seed), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
