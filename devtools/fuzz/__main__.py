"""python3 dev.py fuzz: every target in a process of its own, a table, a JSON file, one closing line."""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from devtools import ROOT

from .targets import TARGETS

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
RESULTS = ROOT / ".dev" / "fuzz"
STILL = 120  # seconds without an execution before a process counts as hung; the machine may be busy
STARTING = 300
HEAD = struct.Struct("<QQ")
COVERED = re.compile(r"cov: (\d+) ")


@dataclass
class Result:
    """edges: covered of the pack's code, as Atheris counts them; None without it."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    edges: int | None = None
    findings: list[str] = field(default_factory=list)


def run(target: str, executions: int, seconds: float, seed: int = 1, atheris: bool = False, findings: Path = CORPUS,
        corpus: Path | None = None) -> Result:
    """Fuzz one target in child processes: another one where a child is killed by what it reads."""
    result = Result(target)
    for again in range(20):
        ended, last, told, log = child({
            "targets": [target], "executions": executions - result.executions, "seconds": seconds - result.seconds,
            "replay": {}, "seed": seed + again, "atheris": atheris, "findings": str(findings),
            "corpus": corpus and str(corpus)})
        if last is None:
            raise SystemExit(f"Failed: the target {target} did not start ({ended}).\n{log[-3000:]}")
        result.executions += last[0]
        result.seconds += told.get("seconds", 0.0)
        result.findings += [found for found in told.get("findings", []) if found not in result.findings]
        if covered := COVERED.findall(log):
            result.edges = max(result.edges or 0, int(covered[-1]))
        if not ended:
            break
        path = findings / target / f"ended-{hashlib.sha256(last[1]).hexdigest()[:8]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(last[1])
        result.findings.append(f"{target}/{path.name}: process {ended}, after {last[0]} executions.\n{log[-1500:]}")
        if result.executions >= executions or result.seconds >= seconds:
            break
    return result


def child(job: dict) -> tuple[str, tuple[int, bytes] | None, dict, str]:
    """(what ended a process that did not end well, number and content of what it read last, its result, its output)."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job | {"folder": name}))
        ended, result = _watch(folder), folder / "result.json"
        return (ended, _current(folder), json.loads(result.read_text()) if result.exists() else {},
                (folder / "log").read_text(errors="replace"))


def _watch(folder: Path) -> str:
    """What ended a child that did not end well, "" for one that did."""
    with open(folder / "log", "wb") as log:
        command = [sys.executable, "-m", "devtools.fuzz.child", str(folder / "job.json")]
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            moved, before = time.monotonic() + STARTING - STILL, None
            while True:
                try:
                    code = child.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    now = (_current(folder) or (0, b""))[0]
                    if now != before:
                        moved, before = (time.monotonic() if now else moved), now
                    if time.monotonic() - moved > STILL:
                        return "hung"
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return "" if code == 0 else f"killed by signal {-code}" if code < 0 else f"ended with {code}"


def _current(folder: Path) -> tuple[int, bytes] | None:
    """(number, content) of what a child reads or has read last; None before the first."""
    try:
        data = (folder / "current").read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < HEAD.size:
        return None
    number, length = HEAD.unpack_from(data)
    return (number, data[HEAD.size:HEAD.size + length]) if number else None


def table(results: list[Result]) -> str:
    lines = [f"| {'target':<14} | executions |   a second | edges | findings | reads |", "|---|---|---|---|---|---|"]
    lines += [f"| {each.target:<14} | {each.executions:>10} | {each.executions / max(each.seconds, 1e-9):>10.0f} |"
              f" {'-' if each.edges is None else each.edges:>5} | {len(each.findings):>8} | {TARGETS[each.target].reads} |"
              for each in results]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py fuzz",
                                     description="Read bad files and hostile workflows until something breaks.")
    parser.add_argument("--minutes", type=float, default=10, help="all targets together take at most; 10 unless told")
    parser.add_argument("--executions", type=int, default=10**6, help="of all targets together at most; a million unless told")
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-atheris", action="store_true", help="use the seeded mutator alone, without coverage")
    parser.add_argument("--findings", type=Path, default=CORPUS, help="folder for inputs that broke something")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results.json and what Atheris has learnt")
    options = parser.parse_args(arguments)
    atheris = not options.without_atheris and importlib.util.find_spec("atheris") is not None
    names, results, started = options.target or [*TARGETS], [], time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        left = len(names) - index
        done, took = sum(each.executions for each in results), time.monotonic() - started
        each = run(name, (options.executions - done) // left + 1, (options.minutes * 60 - took) / left, options.seed, atheris,
                   options.findings.resolve(), (options.out / "corpus").resolve())
        results.append(each)
        found = f", {len(each.findings)} findings" if each.findings else ""
        print(f"{name}: {each.executions} executions in {each.seconds:.0f} s{found}", flush=True)
        for finding in each.findings:
            print(f"  {finding}", flush=True)
    total, findings = sum(each.executions for each in results), sum(len(each.findings) for each in results)
    took = time.monotonic() - started
    content = {"with": "atheris" if atheris else "a seeded mutator", "seed": options.seed, "seconds": took, "executions": total,
               "targets": [asdict(each) for each in results]}
    (options.out / "results.json").write_text(json.dumps(content, indent=1))
    print(f"\n{table(results)}\n")
    print(f"{'Failed' if findings else 'Done'}: {total} executions over {len(results)} targets in {took:.0f} s, {findings}"
          f" findings ({os.path.relpath(options.out / 'results.json')})")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
