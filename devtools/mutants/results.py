"""What became of each mutant, kept in a JSON file and compared with that of another commit."""
import json
import os
import threading
from pathlib import Path

from .sampling import Mutant


class Results:
    """A file of results, written after each of them, so that a run can go on where it was ended.

    Attributes:
        tests: Of each test file without a mutant: its seconds, None where it cannot be used, and
            the tests that fail.
        mutants: What became of each, with the sample's mutant that it is or that it replaces.
    """

    def __init__(self, path: Path, commit: str, seed: int):
        self.path, self.commit, self.seed = path, commit, seed
        self.tests: dict[str, dict] = {}
        self.mutants: list[dict] = []
        self._lock = threading.Lock()
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if (content["commit"], content["seed"]) != (commit, seed):
                raise SystemExit(
                    f"Failed: {path} has results of commit {content['commit'][:12]} with seed "
                    f"{content['seed']}, not of {commit[:12]} with seed {seed}. Name another file"
                    " with --out.")
            self.tests, self.mutants = content["tests"], content["mutants"]

    def has(self, room: str, sampled: Mutant) -> bool:
        return any(entry["room"] == room and entry["sampled"] == sampled.to_json()
                   for entry in self.mutants)

    def add_test(self, file: str, entry: dict):
        with self._lock:
            self.tests[file] = entry
            self._write()

    def add_mutant(self, entry: dict):
        with self._lock:
            self.mutants.append(entry)
            self._write()

    def content(self) -> dict:
        return {
            "commit": self.commit, "seed": self.seed, "tests": self.tests, "mutants": self.mutants
        }

    def _write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(self.content(), indent=1), encoding="utf-8")
        os.replace(partial, self.path)


def _shares(mutants: list[dict]) -> dict[str, tuple[int, int]]:
    """(killed, all) of each room, "all" last."""
    rooms = list(dict.fromkeys(entry["room"] for entry in mutants))
    shares = {}
    for room in [*rooms, "all"]:
        outcomes = [entry["outcome"] for entry in mutants if room in (entry["room"], "all")]
        shares[room] = (sum(outcome != "survived" for outcome in outcomes), len(outcomes))
    return shares


def share_table(*runs: dict) -> str:
    """Return the share of killed mutants of each room, with a column for each run."""
    shares = [_shares(run["mutants"]) for run in runs]
    lines = [
        "| room | " + " | ".join(f"killed at {run['commit'][:9]}" for run in runs) + " |",
        "|---" * (1 + len(runs)) + "|"
    ]
    for room in dict.fromkeys(room for share in shares for room in share):
        cells = [f"{killed} of {number}" + (f" ({killed / number:.0%})" if number else "")
                 for killed, number in (share.get(room, (0, 0)) for share in shares)]
        lines.append(f"| {room} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(before: dict, after: dict) -> tuple[str, bool]:
    """Compare two runs of one sample.

    Returns:
        A report, and whether no room has a lower share of killed mutants than before.
    """
    killed_before = {_key(entry) for entry in before["mutants"]
                     if entry["outcome"] != "survived" and not entry["replaced"]}
    lost = [
        entry for entry in after["mutants"]
        if entry["outcome"] == "survived" and not entry["replaced"] and _key(entry) in killed_before
    ]
    lines = [share_table(before, after), ""]
    replaced = sum(entry["replaced"] for entry in after["mutants"])
    lines += [
        f"{replaced} of {len(after['mutants'])} replaced by the next of the sample, as their code"
        " went."
    ]
    lines += [
        f"{len(lost)} killed before and surviving now{':' if lost else '.'}", *map(describe, lost)
    ]
    shares = [_shares(run["mutants"]) for run in (before, after)]
    lower = [room for room, (killed, number) in shares[1].items()
             if killed * shares[0].get(room, (0, 1))[1] < shares[0].get(room, (0, 1))[0] * number]
    unlike = [room for room in shares[0].keys() | shares[1].keys()
              if shares[0].get(room, (0, 0))[1] != shares[1].get(room, (0, 0))[1]]
    if unlike:
        lines.append(
            f"Not the same number of mutants in: {', '.join(sorted(unlike))}. Let both runs end.")
    lines.append(f"Failed: a lower share in {', '.join(lower)}."
                 if lower else "Done: no share is lower than before.")
    return "\n".join(lines), not lower


def _key(entry: dict) -> tuple[str, str]:
    return entry["room"], json.dumps(entry["sampled"], sort_keys=True)


def describe(entry: dict) -> str:
    """Return a result in a line."""
    mutant = entry["mutant"]
    where = f"{mutant['file']}:{entry['line']} in {mutant['definition'] or 'the module'}"
    by = f" by {entry['by']}" if entry["by"] else ""
    return f"{entry['outcome']}{by}: {where}, {mutant['operator']}: {mutant['text']}"
