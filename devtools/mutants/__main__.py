"""python -m devtools.mutants: draw a sample of mutants, run the tests on it, compare two runs."""
import argparse
import json
import signal
import sys
from pathlib import Path

from devtools import ROOT

from . import running
from .results import compare, share_table
from .sampling import ROOMS, draw_sample, write_sample

SAMPLE = Path(__file__).with_name("sample.json")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m devtools.mutants",
        description="Plant faults and count which of them the tests find.")
    commands = parser.add_subparsers(dest="command", required=True)

    sample = commands.add_parser("sample", help="draw a sample of a commit's mutants")
    sample.add_argument("--seed", type=int, default=29)
    sample.add_argument("--size", type=int, default=100,
                        help="mutants of each room; 100 unless told")

    run = commands.add_parser(
        "run", help="run the tests on each mutant of the sample that has no result yet")
    run.add_argument("--room", choices=[*ROOMS], action="append",
                     help="only this one; may be given again")
    run.add_argument("--limit", type=int, metavar="N", help="at most N more of each room")
    run.add_argument("--processes", type=int, default=1, metavar="N",
                     help="mutants at once; 1 unless told")
    run.add_argument("--seconds", type=float, default=running.BUDGET,
                     help=f"of tests for a mutant that survives; {running.BUDGET:.0f} unless told")
    run.add_argument("--out", type=Path,
                     help="file of the results; .dev/mutants/COMMIT.json unless told")

    for command in (sample, run):
        command.add_argument("--commit", default="HEAD",
                             help="whose code and tests are used; HEAD unless told")
        command.add_argument("--sample", type=Path, default=SAMPLE, help="file of the sample")

    comparison = commands.add_parser("compare", help="compare two files of results")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)

    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("Stopped. Run the same command again to go on."))
    if options.command == "compare":
        report, fine = compare(_read(options.before), _read(options.after))
        print(report)
        return 0 if fine else 1

    commit = running.resolve_commit(ROOT, options.commit)
    if options.command == "sample":
        with running.clone(ROOT, commit) as clone:
            drawn = draw_sample(clone.tree, options.seed, commit, options.size)
        write_sample(options.sample, drawn)
        print(f"Done: {sum(map(len, drawn['rooms'].values()))} mutants in {options.sample}")
        return 0

    out = options.out or ROOT / ".dev" / "mutants" / f"{commit[:12]}.json"
    rooms = {name: ROOMS[name] for name in options.room or ROOMS}
    content = running.run(ROOT, _read(options.sample), commit, out, rooms, options.seconds,
                          options.processes, options.limit)
    print(f"\n{share_table(content)}\n\nDone: {len(content['mutants'])} mutants in {out}")
    return 0


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(
            f"Failed: there is no file {path}. `python -m devtools.mutants --help` says which"
            " command writes it."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
