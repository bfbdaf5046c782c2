"""python3 dev.py fuzz: every target in a process of its own, a table, a JSON file, one closing
line."""
import argparse
import hashlib
import importlib.util
import json
import os
import random
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
BEGINNINGS, CHOICES = 64, 1 << 12  # first inputs of Atheris, of so many bytes
EDGES = re.compile(r"cov: (\d+) ")
WHY = re.compile(r"FindingError: (.*?)(?=^Traceback|^==|^You can|^Failing|^Falsifying|^\s*\+|\Z)",
                 re.DOTALL | re.MULTILINE)


@dataclass
class Result:
    """What came of one target.

    Attributes:
        outcomes: how many different ones there were: it was read, or the lines that refused it.
        edges: of the pack's code that were covered, as Atheris counts them; None without it.
        finding: what ended it, "" for nothing.
        file: the input that broke a rule.
    """
    target: str
    executions: int = 0
    seconds: float = 0.0
    outcomes: int = 0
    edges: int | None = None
    finding: str = ""
    file: str = ""


def fuzz(target: str, executions: int, seconds: float, seed: int, atheris: bool, findings: Path,
         out: Path) -> Result:
    """Fuzzes one target until an input breaks a rule, which is kept in `findings`, as small as
    Hypothesis can make it.

    Args:
        out: folder for Hypothesis's examples, and for Atheris's inputs that reached new lines;
            those of earlier runs are read first.
    """
    kept = out / target
    learnt = kept / "corpus"
    learnt.mkdir(parents=True, exist_ok=True)
    current, counts = kept / "current", kept / "counts.json"
    for path in (current, counts):
        path.unlink(missing_ok=True)
    options = []
    if atheris:
        chance = random.Random(seed)
        for number in range(0 if any(learnt.iterdir()) else BEGINNINGS):
            (learnt / f"first-{number}").write_bytes(chance.randbytes(CHOICES))
        options = ["-rss_limit_mb=0", "-malloc_limit_mb=0", "-len_control=0", "-print_pcs=0",
                   f"-timeout={2 * HANGS}", f"-max_len={CHOICES}", f"-runs={executions}",
                   f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}",
                   f"-artifact_prefix={kept}{os.sep}", str(learnt)]
    started = time.monotonic()
    code, output = run_worker(target, kept, seconds, executions, seed, *options)
    result = Result(target, seconds=time.monotonic() - started,
                    **(json.loads(counts.read_text()) if counts.exists() else {}))
    edges = EDGES.findall(output)
    result.edges = int(edges[-1]) if edges else None
    if code:
        broken = current.read_bytes() if current.exists() else None
        # which makes it smaller
        if atheris and broken is not None and run_worker(target, kept, 0, 0, seed)[0]:
            broken = current.read_bytes()
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
        ["target", "reads", "executions", "outcomes", "edges covered"],
        [[f"`{each.target}`", TARGETS[each.target].reads, str(each.executions),
          str(each.outcomes), "-" if each.edges is None else str(each.edges)]
         for each in results])


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
    parser.add_argument("--without-atheris", action="store_true",
                        help="use Hypothesis alone, without coverage")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE",
                        help="only read these inputs again")
    parser.add_argument("--findings", type=Path, default=CORPUS,
                        help="folder for inputs that broke something")
    parser.add_argument("--out", type=Path, default=RESULTS,
                        help="folder for results.json and what was learnt")
    options = parser.parse_args(arguments)
    if options.replay:
        return replay(options.replay)
    atheris = not options.without_atheris and importlib.util.find_spec("atheris") is not None
    names, results, started = options.target or [*TARGETS], [], time.monotonic()
    out, findings = options.out.resolve(), options.findings.resolve()
    for index, name in enumerate(names):
        left = len(names) - index
        executions = (options.executions - sum(each.executions for each in results)) // left + 1
        remaining = (options.minutes * 60 - (time.monotonic() - started)) / left
        # the first ones may have taken more to begin and to make findings smaller
        seconds = max(remaining, options.minutes * 30 / len(names))
        result = fuzz(name, executions, seconds, options.seed, atheris, findings, out)
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
        "with": "atheris" if atheris else "hypothesis", "seed": options.seed, "seconds": took,
        "executions": total, "targets": [asdict(each) for each in results]}, indent=1))
    print(f"\n{table(results)}")
    print(f"{'Failed' if broken else 'Done'}: {total} executions over {len(results)} targets in"
          f" {took:.0f} s, {broken} findings ({os.path.relpath(out / 'results.json')})")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
