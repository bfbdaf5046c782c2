"""python3 dev.py soak: hours under load, as JSON, a plot and one closing line."""
import argparse
import json
import sys
import time
from pathlib import Path

from devtools.measure.timing import machine

from devtools import ROOT
from devtools.host.server import Server, ServerError
from devtools.soak import fixtures, probe_nodes, verdict
from devtools.soak.requests import Asks
from devtools.soak.run import Client, RunLog, run

CLIENTS = 2
CACHE_GB = 0.02  # of what is packed while loading: less than all of it, so that entries come and go


def server_for(base: Path) -> Server:
    """A server in `base`, all of whose temporary files lie there; it keeps what it packs, in a
    cache that is too small."""
    for name in ("tmp", "cache"):
        (base / name).mkdir(parents=True, exist_ok=True)
    env = {
        "TMPDIR": str(base / "tmp"), "XDG_CACHE_HOME": str(base / "cache"),
        "FEATHERWEIGHT_PACKED_CACHE": str(base / "packed"),
        "FEATHERWEIGHT_PACKED_CACHE_GB": str(CACHE_GB), "OMP_NUM_THREADS": "1"
    }  # products this small only wait for other threads
    source = Path(probe_nodes.__file__).read_text(encoding="utf-8")
    return Server(base, extra_custom_nodes={"soak": source}, env=env)


def soak(base: Path, prompts: int, minutes: float, every: int, seed: int = 1,
         only: tuple[str, ...] = (), show=lambda reading: None,
         run_log: RunLog | None = None) -> RunLog:
    """Write the files into `base`, if they are not there, and run; `run_log` grows as it goes."""
    run_log = run_log or RunLog()
    if text := fixtures.stamp(base):
        fixtures.write(base)
        (base / "written.json").write_text(text)
    with server_for(base) as server:
        clients = [
            Client(server.another_client(), Asks(base, seed, number, only), run_log)
            for number in range(CLIENTS)
        ]
        return run(server, clients, run_log, prompts, minutes, every, show)


def write(run_log: RunLog, out: Path, about: dict):
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        **about, "line": verdict.closing_line(run_log), "broken": verdict.broken(run_log),
        "prompts": run_log.prompts, "outcomes": dict(sorted(run_log.outcomes.items())),
        "repeated": run_log.repeated, "pictures": len(run_log.pictures), "growth": {
            name: verdict.growth(run_log.readings, name) for name in ("rss", "private", "objects")
        }, "readings": run_log.readings
    }
    (out / "soak.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    where = f"{about['machine']}, seed {about['seed']}, {about['started']}"
    verdict.plot(run_log.readings, figures["line"], where).save(out / "soak.png")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev.py soak",
                                     description="Drive the real server for hours, by two clients.")
    parser.add_argument("--minutes", type=float, default=120, help="after which it ends")
    parser.add_argument("--prompts", type=int, default=1_000_000, help="after which it ends")
    parser.add_argument("--every", type=int, default=50,
                        help="prompts from one reading to the next")
    parser.add_argument("--seed", type=int, default=1,
                        help="another one asks for other things in another order")
    parser.add_argument("--only", nargs="+", default=(), metavar="KIND",
                        help="of the methods in devtools/soak/requests.py that ask")
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "soak",
                        help="folder for soak.json, soak.png and the files")
    options = parser.parse_args(arguments)
    about = {"started": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(),
             "seed": options.seed}
    print(f"Writing models and starting ComfyUI in {options.out / 'base'}", flush=True)
    run_log = RunLog()

    def show(reading: dict):
        write(run_log, options.out, about)
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in reading.items()),
              flush=True)

    try:
        soak(options.out / "base", options.prompts, options.minutes, options.every, options.seed,
             tuple(options.only), show, run_log)
    except ServerError as error:
        run_log.mistakes.append(str(error))
    write(run_log, options.out, about)
    print("\n".join(f"  {line}" for line in verdict.broken(run_log)[:20]))
    print(f"{verdict.closing_line(run_log)} (soak.json and soak.png in {options.out})")
    return 1 if verdict.broken(run_log) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
