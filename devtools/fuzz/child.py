"""Targets in this process: files read, then fuzzed. `python -m devtools.fuzz.child JOB.json`.

The job is a dict: `targets`, `folder` (of its own), of each target `executions` and `seconds` at most, `seed`, `atheris` (use
it or not), `findings` (a folder), `corpus` (of Atheris, None for none), `replay` (target -> files to read first). What is read
now lies in `folder/current`, so that the parent has it should this process end: u64 executions, u64 length, content. Findings
and counts are in `folder/result.json`, written as they come.
"""
import contextlib
import hashlib
import json
import logging
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path

import torch

os.environ["FEATHERWEIGHT_KERNELS"] = "torch"  # nothing is compiled and tried beside what is read

import devtools.measure  # noqa: E402, F401  the host and the pack

from .guard import Finding, Guard  # noqa: E402
from .targets import TARGETS  # noqa: E402

MOST_BYTES = max(target.longest for target in TARGETS.values())
SHRINKING = 400  # attempts at a smaller input of the same finding
HEAD = struct.Struct("<QQ")


class Campaign:
    """Reads inputs of one target under the guard and keeps the first of each kind of finding, made smaller.

    before: executions of the targets before it.
    """

    def __init__(self, job: dict, name: str, guard: Guard, found: dict[tuple, str], before: int):
        self.job, self.name, self.folder, self.guard, self.found = job, name, Path(job["folder"]), guard, found
        self.executions, self.before = 0, before
        work = self.folder / "files" / name
        work.mkdir(parents=True)
        self.target = TARGETS[name](work)
        with open(self.folder / "current", "a+b") as file:
            file.truncate(HEAD.size + MOST_BYTES)
            self.current = mmap.mmap(file.fileno(), 0)
        with _watched() if job["atheris"] else contextlib.nullcontext():
            self.inputs = self.target.prepare()
        for data in self.inputs:  # what is imported when first needed is imported now
            self.target.lay_out(data)
            with contextlib.suppress(Exception):
                self.target.read(data)
            self.target.clear()
        guard.settle()
        self.started = time.monotonic()

    def read(self, data: bytes, name: str = ""):
        finding = self.once(data)
        if finding is not None and (name or self.key(finding) not in self.found):
            self.keep(finding, data, name)

    def key(self, finding: Finding) -> tuple:
        return (self.name, *finding.key)

    def once(self, data: bytes) -> Finding | None:
        data = data[:self.target.longest]
        self.executions += 1
        self.current[:HEAD.size + len(data)] = HEAD.pack(self.before + self.executions, len(data)) + data
        return self.guard.run(self.target, data)

    def keep(self, finding: Finding, data: bytes, name: str):
        if not name:
            data = self.smaller(finding, data)
            name = f"{finding.kind}-{hashlib.sha256(data).hexdigest()[:8]}"
            path = Path(self.job["findings"]) / self.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.found.setdefault(self.key(finding), "")
        self.found[(*self.key(finding), name)] = f"{self.name}/{name}: {finding.kind}, {finding.text}"
        self.tell()

    def smaller(self, finding: Finding, data: bytes) -> bytes:
        """As few bytes as some hundred attempts leave of an input, with the same finding."""
        left, size = SHRINKING, max(1, len(data) // 2)
        while size and left > 0:
            at = 0
            while at < len(data) and left > 0:
                attempt, left = data[:at] + data[at + size:], left - 1
                again = self.once(attempt)
                if again is not None and again.key == finding.key:
                    data = attempt
                else:
                    at += size
            size //= 2
        return data

    def tell(self):
        result = {"seconds": time.monotonic() - self.started, "findings": list(filter(None, self.found.values()))}
        part = self.folder / "result.part"
        part.write_text(json.dumps(result))
        os.replace(part, self.folder / "result.json")

    def fuzz(self):
        """With a seeded mutator alone."""
        chance, inputs = random.Random(self.job["seed"]), [*self.inputs, *_contents(self.job["findings"], self.name)]
        for data in inputs:
            if not self.is_over():
                self.read(data)
        while not self.is_over():
            self.read(self.mutated(chance.choice(inputs), chance))

    def is_over(self) -> bool:
        return self.executions >= self.job["executions"] or time.monotonic() - self.started >= self.job["seconds"]

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            data = self.target.damaged(data, chance)[:self.target.longest]
        return data

    def fuzz_with_atheris(self):
        """Never returns: libFuzzer ends the process."""
        import atheris

        def mutate(data: bytes, longest: int, seed: int) -> bytes:
            if seed % 8 == 0:
                return atheris.Mutate(data, longest)
            return self.mutated(data, random.Random(seed))[:longest]

        def one(data: bytes):
            self.read(data)
            if self.executions % 500 == 0:
                self.tell()
            if self.is_over():
                self.tell()
                sys.stderr.flush()
                os._exit(0)

        corpus = Path(self.job["corpus"]) / self.name
        corpus.mkdir(parents=True, exist_ok=True)
        for data in [*self.inputs, *_contents(self.job["findings"], self.name)]:
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        atheris.Setup([
            "fuzz", "-timeout=86400", "-rss_limit_mb=0", "-malloc_limit_mb=0", f"-max_len={self.target.longest}",
            "-len_control=0", "-print_pcs=0",
            f"-seed={self.job['seed']}", f"-artifact_prefix={self.folder}{os.sep}", str(corpus)], one, custom_mutator=mutate)
        atheris.Fuzz()


def _watched():
    import atheris
    return atheris.instrument_imports(include=["featherweight"])


def _contents(folder: str, target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((Path(folder) / target).glob("*"))]


def main(job: dict):
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    guard, found, executions = Guard(), {}, 0
    for name in job["targets"]:
        campaign = Campaign(job, name, guard, found, executions)
        for path in job["replay"].get(name, ()):
            campaign.read(Path(path).read_bytes(), Path(path).name)
        campaign.tell()
        if job["executions"]:
            campaign.fuzz_with_atheris() if job["atheris"] else campaign.fuzz()
        campaign.tell()
        executions += campaign.executions


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
