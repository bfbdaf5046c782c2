"""Targets in this process, under the guard.

    python -m devtools.fuzz.worker TARGET [OPTION OF LIBFUZZER | FILE | FOLDER ...]
    python -m devtools.fuzz.worker --hypothesis TARGET EXECUTIONS SEED
    python -m devtools.fuzz.worker --replay EXECUTIONS < JOB

The first mutates with Atheris, the second with Hypothesis, where Atheris has no wheel; the third
reads what is in files, and some new inputs. JOB is JSON, target -> paths. A replay prints a line of
JSON before each input, {"target", "input"}, and one with "finding" after each that broke a rule. In
the other two the first finding ends the process.
"""
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

os.environ["FEATHERWEIGHT_KERNELS"] = "torch"  # nothing is compiled and tried beside what is read

import devtools.measure  # noqa: F401  the host and the pack

from .guard import Finding, Guard
from .targets import TARGETS, Target

CHANGES = [1, 1, 1, 2, 4]  # how often an input is damaged: one of these


class FindingError(Exception):
    """An input broke a rule; libFuzzer and Hypothesis keep an input that raises."""

    def __init__(self, finding: Finding):
        super().__init__(f"{finding.kind}, {finding.where}: {finding.text}")


def prepared(name: str, folder: Path, guard: Guard) -> tuple[Target, list[bytes]]:
    """A target and its honest inputs. What is imported when first needed is imported."""
    work = folder / name
    work.mkdir()
    target = TARGETS[name](work)
    inputs = target.prepare()
    for data in inputs:
        target.lay_out(data)
        with contextlib.suppress(Exception):
            target.read(data)
        target.clear()
    guard.settle()
    return target, inputs


def read(guard: Guard, target: Target, data: bytes):
    """Raises FindingError."""
    finding = guard.run(target, data[:target.longest])
    if finding is not None:
        raise FindingError(finding)


def damaged(target: Target, data: bytes, chance: random.Random) -> bytes:
    for _ in range(chance.choice(CHANGES)):
        data = target.damaged(data, chance)[:target.longest]
    return data


def fuzz_with_atheris(name: str, arguments: list[str], folder: Path):
    """Never returns: libFuzzer ends the process."""
    import atheris

    guard = Guard()
    with atheris.instrument_imports(include=["featherweight"]):
        target, inputs = prepared(name, folder, guard)
    folders = [path for path in arguments if os.path.isdir(path)]
    for number, data in enumerate(inputs if folders else ()):
        Path(folders[0], f"honest-{number}").write_bytes(data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        if seed % 8 == 0:
            return atheris.Mutate(data, longest)
        return damaged(target, data, random.Random(seed))[:longest]

    # libFuzzer starts itself by its first argument to make an input smaller.
    command = f"{sys.executable} -m {__spec__.name} {name}"
    atheris.Setup([command, f"-max_len={target.longest}", *arguments],
                  lambda data: read(guard, target, data), custom_mutator=mutate)
    atheris.Fuzz()


def fuzz_with_hypothesis(guard: Guard, target: Target, inputs: list[bytes], executions: int,
                         seed: int):
    """Raises FindingError for the smallest change that Hypothesis comes to."""
    import hypothesis
    from hypothesis import strategies

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=executions, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategies.sampled_from(inputs), strategies.randoms(use_true_random=False))
    def fuzz(data, chance):
        read(guard, target, damaged(target, data, chance))

    fuzz()


def replay(files: dict[str, list[str]], executions: int, folder: Path):
    guard = Guard()

    def tell(**line):
        print(json.dumps(line), flush=True)

    for name, paths in files.items():
        target, inputs = prepared(name, folder, guard)
        for path in paths:
            tell(target=name, input=path)
            try:
                read(guard, target, Path(path).read_bytes())
            except FindingError as finding:
                tell(target=name, finding=str(finding))
        tell(target=name, input="new")
        try:
            fuzz_with_hypothesis(guard, target, inputs, executions, 1)
        except FindingError as finding:
            tell(target=name, finding=str(finding))


def main(arguments: list[str]):
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        match arguments:
            case ["--replay", executions]:
                replay(json.load(sys.stdin), int(executions), Path(name))
            case ["--hypothesis", target, executions, seed]:
                guard = Guard()
                fuzz_with_hypothesis(guard, *prepared(target, Path(name), guard), int(executions),
                                     int(seed))
            case [target, *options]:
                fuzz_with_atheris(target, options, Path(name))


if __name__ == "__main__":
    main(sys.argv[1:])
