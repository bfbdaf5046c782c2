"""One target in this process: fuzzed, or read from files. `python -m devtools.fuzz.child JOB.json`.

The job is a dict: `target`, `folder` (of its own), `executions` and `seconds` at most, `seed`, `atheris` (whether to use it),
`findings` (a folder), `corpus` (of Atheris, None for none), `replay` (files to read in place of fuzzing). What is read now lies in
`folder/current`, so that the parent has it should this process end: u64 executions, u64 length, content. Findings and counts are
in `folder/result.json`, written as they come.
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

import devtools.measure  # noqa: F401  the host and the pack

from .guard import Finding, Guard
from .targets import TARGETS

LONGEST_INPUT = 1 << 16
SHRINKING = 400  # attempts at a smaller input of the same finding
HEAD = struct.Struct("<QQ")


class Campaign:
    """Reads inputs under the guard and keeps the first of each kind of finding, made smaller."""

    def __init__(self, job: dict):
        self.job, self.folder = job, Path(job["folder"])
        self.found: dict[tuple[str, str], str] = {}
        self.executions, self.seconds = 0, 0.0
        with open(self.folder / "current", "w+b") as file:
            file.truncate(HEAD.size + LONGEST_INPUT)
            self.current = mmap.mmap(file.fileno(), 0)
        work = self.folder / "files"
        work.mkdir()
        self.target = TARGETS[job["target"]](work)
        with _watched() if job["atheris"] else contextlib.nullcontext():
            self.honest = self.target.prepare()
        self.guard = Guard(work, self.target.own)
        for data in self.honest:  # what is imported when first needed is imported now
            self.target.lay_out(data)
            with contextlib.suppress(Exception):
                self.target.read(data)
            self.target.clear()
        self.started = time.monotonic()

    def read(self, data: bytes, name: str = ""):
        finding = self.once(data)
        if finding is not None and (finding.key not in self.found or name):
            self.keep(finding, data, name)

    def once(self, data: bytes) -> Finding | None:
        data = data[:LONGEST_INPUT]
        self.executions += 1
        self.current[:HEAD.size + len(data)] = HEAD.pack(self.executions, len(data)) + data
        return self.guard.run(self.target, data)

    def keep(self, finding: Finding, data: bytes, name: str):
        if not name:
            data = self.smaller(finding, data)
            name = f"{finding.kind}-{hashlib.sha256(data).hexdigest()[:8]}"
            path = Path(self.job["findings"]) / self.job["target"] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self.found[finding.key + ((name,) if self.job["replay"] else ())] = f"{name}: {finding.kind}, {finding.text}"
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
        result = {"executions": self.executions, "seconds": time.monotonic() - self.started, "findings": list(self.found.values())}
        part = self.folder / "result.part"
        part.write_text(json.dumps(result))
        os.replace(part, self.folder / "result.json")

    def replay(self, paths: list[str]):
        for path in paths:
            self.read(Path(path).read_bytes(), Path(path).name)

    def fuzz(self):
        """With a seeded mutator alone."""
        chance, inputs = random.Random(self.job["seed"]), [*self.honest, *_contents(self.job["findings"], self.job["target"])]
        for data in inputs:
            self.read(data)
        while not self.is_over():
            self.read(self.mutated(chance.choice(inputs), chance))

    def is_over(self) -> bool:
        return self.executions >= self.job["executions"] or time.monotonic() - self.started >= self.job["seconds"]

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            data = self.target.damaged(data, chance)[:LONGEST_INPUT]
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

        corpus = Path(self.job["corpus"]) / self.job["target"]
        corpus.mkdir(parents=True, exist_ok=True)
        for data in [*self.honest, *_contents(self.job["findings"], self.job["target"])]:
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        atheris.Setup([
            "fuzz", "-timeout=86400", "-rss_limit_mb=0", "-malloc_limit_mb=0", f"-max_len={LONGEST_INPUT}", "-len_control=0", "-print_pcs=0",
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
    campaign = Campaign(job)
    campaign.tell()
    if job["replay"]:
        campaign.replay(job["replay"])
    elif job["atheris"]:
        campaign.fuzz_with_atheris()
    else:
        campaign.fuzz()
    campaign.tell()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
