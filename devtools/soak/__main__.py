"""python3 dev.py soak: hours under load, as JSON and one closing line."""
import argparse
import json
import sys

from devtools import ROOT
from devtools.host.server import ServerError
from devtools.soak import fixtures
from devtools.soak.run import RunLog, soak

OUT = ROOT / ".dev" / "soak"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev.py soak",
                                     description="Drive the real server for hours, by two clients.")
    parser.add_argument("--minutes", type=float, default=120, help="after which it ends")
    parser.add_argument("--prompts", type=int, default=1_000_000, help="after which it ends")
    parser.add_argument("--seed", type=int, default=1,
                        help="another one asks for other things in another order")
    options = parser.parse_args(arguments)
    print(f"Writing models and starting ComfyUI in {OUT / 'base'}", flush=True)
    run_log = RunLog()
    fixtures.write(OUT / "base")
    try:
        soak(OUT / "base", options.prompts, options.minutes, 50, options.seed, run_log,
             lambda reading: print(f"  {reading}", flush=True))
    except ServerError as error:
        run_log.mistakes.append(str(error))
    found = {"line": run_log.closing_line(), "broken": run_log.broken(),
             "readings": run_log.readings}
    (OUT / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*run_log.broken()[:20], f"{run_log.closing_line()} (soak.json in {OUT})"]))
    return 1 if run_log.broken() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
