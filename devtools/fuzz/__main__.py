"""python3 dev.py fuzz: every target in a process of its own, a table, a JSON file, one closing
line."""
import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from devtools import ROOT, markdown_table

from .targets import TARGETS

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
RESULTS = ROOT / ".dev" / "fuzz"
WORKER = [sys.executable, "-m", "devtools.fuzz.worker"]
HANGS = 120  # seconds, after which an input is ended; the machine may be busy
WHY = re.compile(r"FindingError: (.*?)(?=^Traceback|^==|^You can|^Failing|^Falsifying|^\s*\+|\Z)",
                 re.DOTALL | re.MULTILINE)


@dataclass
class Result:
    """What came of one target.

    Attributes:
        outcomes: how many different ones there were: it was read, or the lines that refused it.
        finding: what ended it, "" for nothing.
        file: the input that broke a rule.
    """
    target: str
    executions: int = 0
    seconds: float = 0.0
    outcomes: int = 0
    finding: str = ""
    file: str = ""


def fuzz(target: str, executions: int, seconds: float, seed: int, findings: Path,
         out: Path) -> Result:
    """Fuzzes one target until an input breaks a rule, which is kept in `findings`, as small as
    Hypothesis can make it.

    Args:
        out: folder for Hypothesis's examples; those of earlier runs are read first.
    """
    kept = out / target
    kept.mkdir(parents=True, exist_ok=True)
    current, counts = kept / "current", kept / "counts.json"
    for path in (current, counts):
        path.unlink(missing_ok=True)
    started = time.monotonic()
    code, output = run_worker(target, kept, seconds, executions, seed)
    result = Result(target, seconds=time.monotonic() - started,
                    **(json.loads(counts.read_text()) if counts.exists() else {}))
    if code:
        broken = current.read_bytes() if current.exists() else None
        why = WHY.findall(output)
        result.finding = (why[-1] if why else f"ended with {code}\n{output[-1500:]}").strip()
        if broken is not None:
            path = findings / target / hashlib.sha256(broken).hexdigest()[:12]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(broken)
            result.file = str(path)
    return result


def run_worker(*arguments) -> tuple[int, str]:
    """Returns the exit status and the output of a process with a target."""
    ended = subprocess.run([*WORKER, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace")
    return ended.returncode, ended.stdout


def replay(paths: list[Path]) -> int:
    """Reads inputs again, each by the target that its folder is named after."""
    job: dict[str, list[str]] = {}
    for path in paths:
        job.setdefault(path.resolve().parent.name, []).append(str(path.resolve()))
    ended = subprocess.run([*WORKER, "--replay", "0"], cwd=ROOT, input=json.dumps(job),
                           stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    found = [line["finding"] for line in lines if "finding" in line]
    if ended.returncode:
        found.append(f"the process ended with {ended.returncode} after {lines[-1:]}")
    print("\n".join(found))
    print(f"{'Failed' if found else 'Done'}: {len(paths)} inputs, {len(found)} findings")
    return 1 if found else 0


def table(results: list[Result]) -> str:
    return markdown_table(
        ["target", "reads", "executions", "outcomes"],
        [[f"`{each.target}`", TARGETS[each.target].reads, str(each.executions),
          str(each.outcomes)] for each in results])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py fuzz",
        description="Read damaged files and hostile workflows until something breaks.")
    parser.add_argument("--minutes", type=float, default=10,
                        help="all targets together take about; 10 unless told")
    parser.add_argument("--executions", type=int, default=10**6,
                        help="of all targets together at most; a million unless told")
    parser.add_argument("--target", choices=[*TARGETS], action="append",
                        help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE",
                        help="only read these inputs again")
    parser.add_argument("--findings", type=Path, default=CORPUS,
                        help="folder for inputs that broke something")
    parser.add_argument("--out", type=Path, default=RESULTS,
                        help="folder for results.json and examples")
    options = parser.parse_args(arguments)
    if options.replay:
        return replay(options.replay)
    names, results, started = options.target or [*TARGETS], [], time.monotonic()
    out, findings = options.out.resolve(), options.findings.resolve()
    for index, name in enumerate(names):
        left = len(names) - index
        executions = (options.executions - sum(each.executions for each in results)) // left + 1
        remaining = (options.minutes * 60 - (time.monotonic() - started)) / left
        # the first ones may have taken more to begin and to make findings smaller
        seconds = max(remaining, options.minutes * 30 / len(names))
        result = fuzz(name, executions, seconds, options.seed, findings, out)
        results.append(result)
        print(f"{name}: {result.executions} executions in {result.seconds:.0f} s,"
              f" {result.outcomes} outcomes {result.finding}", flush=True)
        if result.file:
            print(f"  read it again: python3 dev.py fuzz --replay {os.path.relpath(result.file)}",
                  flush=True)
    total = sum(each.executions for each in results)
    broken = sum(bool(each.finding) for each in results)
    took = time.monotonic() - started
    (out / "results.json").write_text(json.dumps({
        "seed": options.seed, "seconds": took, "executions": total,
        "targets": [asdict(each) for each in results]}, indent=1))
    print(f"\n{table(results)}")
    print(f"{'Failed' if broken else 'Done'}: {total} executions over {len(results)} targets in"
          f" {took:.0f} s, {broken} findings ({os.path.relpath(out / 'results.json')})")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
