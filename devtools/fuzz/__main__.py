"""python3 dev.py fuzz: every target in a process of its own, a table, a JSON file, one closing
line."""
import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from devtools import ROOT

from .targets import TARGETS

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
RESULTS = ROOT / ".dev" / "fuzz"
WORKER = [sys.executable, "-m", "devtools.fuzz.worker"]
STILL = 120  # seconds that one input may take; the machine may be busy
SMALLER = 60  # seconds in which a finding is made smaller
DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
EDGES = re.compile(r"cov: (\d+) ")
WRITTEN = re.compile(r"Test unit written to (\S+)")
WHY = re.compile(r"FindingError: (.*?)(?=^Traceback|^==|\Z)", re.DOTALL | re.MULTILINE)


@dataclass
class Result:
    """edges: covered of the pack's code, as Atheris counts them; None without it. finding: what
    ended it, "" for nothing."""

    target: str
    executions: int = 0
    seconds: float = 0.0
    edges: int | None = None
    finding: str = ""


def run_worker(*arguments) -> tuple[int, str]:
    """(exit status, output) of a process with a target."""
    ended = subprocess.run([*WORKER, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace")
    return ended.returncode, ended.stdout


def fuzz(target: str, executions: int, seconds: float, seed: int, findings: Path,
         learnt: Path) -> Result:
    """Fuzz one target until an input breaks a rule, which is kept in `findings`, as small as
    libFuzzer can make it.

    learnt: folder for the inputs that reached new lines; those of earlier runs are read first.
    """
    for folder in (findings / target, learnt / target):
        folder.mkdir(parents=True, exist_ok=True)
    libfuzzer = [
        "-rss_limit_mb=0", "-malloc_limit_mb=0", "-len_control=0", "-print_pcs=0",
        "-print_final_stats=1", f"-timeout={STILL}", f"-artifact_prefix={findings / target}{os.sep}"
    ]
    started = time.monotonic()
    code, output = run_worker(target, *libfuzzer, f"-runs={executions}",
                         f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}",
                         learnt / target, findings / target)
    result = Result(target, seconds=time.monotonic() - started)
    result.executions = int(last(DONE, output) or 0)
    result.edges = int(last(EDGES, output) or 0)
    if code:
        written = last(WRITTEN, output)
        result.finding = (
            f"{written or f'ended with {code}'}: {(last(WHY, output) or output[-1500:]).strip()}"
        )
        if written:
            minimize(target, written, libfuzzer)
    return result


def minimize(target: str, path: str, libfuzzer: list[str]):
    """Make an input smaller for as long as `SMALLER`. libFuzzer starts a process for each step."""
    process = subprocess.Popen(
        [*WORKER, target, *libfuzzer, "-minimize_crash=1", f"-exact_artifact_path={path}", path],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(SMALLER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def fuzz_without_atheris(target: str, executions: int, seed: int) -> Result:
    """Fuzz one target by Hypothesis, which prints the smallest change that it came to and keeps no
    input."""
    started = time.monotonic()
    code, output = run_worker("--hypothesis", target, executions, seed)
    return Result(target, executions,
                  time.monotonic() - started, finding=output[-3000:] if code else "")


def last(pattern: re.Pattern, text: str) -> str | None:
    matches = pattern.findall(text)
    return matches[-1] if matches else None


def table(results: list[Result]) -> str:
    lines = [
        f"| {'target':<14} | executions |   a second | edges | reads |", "|---|---|---|---|---|"
    ]
    lines += [
        f"| {each.target:<14} | {each.executions:>10} |"
        f" {each.executions / max(each.seconds, 1e-9):>10.0f} |"
        f" {'-' if each.edges is None else each.edges:>5} | {TARGETS[each.target].reads} |"
        for each in results
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py fuzz",
        description="Read bad files and hostile workflows until something breaks.")
    parser.add_argument("--minutes", type=float, default=10,
                        help="all targets together take at most; 10 unless told")
    parser.add_argument("--executions", type=int, default=10**6,
                        help="of all targets together at most; a million unless told")
    parser.add_argument("--target", choices=[*TARGETS], action="append",
                        help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-atheris", action="store_true",
                        help="use Hypothesis, without coverage")
    parser.add_argument("--findings", type=Path, default=CORPUS,
                        help="folder for inputs that broke something")
    parser.add_argument("--out", type=Path, default=RESULTS,
                        help="folder for results.json and what Atheris has learnt")
    options = parser.parse_args(arguments)
    atheris = not options.without_atheris and importlib.util.find_spec("atheris") is not None
    names, results, started = options.target or [*TARGETS], [], time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        left = len(names) - index
        executions = (options.executions - sum(each.executions for each in results)) // left + 1
        if atheris:
            seconds = (options.minutes * 60 - (time.monotonic() - started)) / left
            result = fuzz(name, executions, seconds, options.seed, options.findings.resolve(),
                          (options.out / "corpus").resolve())
        else:
            result = fuzz_without_atheris(name, executions, options.seed)
        results.append(result)
        print(f"{name}: {result.executions} executions in {result.seconds:.0f} s {result.finding}",
              flush=True)
    total, findings = (
        sum(each.executions for each in results),
        sum(bool(each.finding) for each in results),
    )
    took = time.monotonic() - started
    content = {
        "with": "atheris" if atheris else "hypothesis", "seed": options.seed, "seconds": took,
        "executions": total, "targets": [asdict(each) for each in results]
    }
    (options.out / "results.json").write_text(json.dumps(content, indent=1))
    print(f"\n{table(results)}\n")
    print(
        f"{'Failed' if findings else 'Done'}: {total} executions over {len(results)} targets in"
        f" {took:.0f} s, {findings} findings ({os.path.relpath(options.out / 'results.json')})")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
