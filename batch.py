"""Draw many rows of one workflow, on one machine or a Ray cluster: python3 batch.py
WORKFLOW_API.json ROWS.jsonl OUT"""
import argparse
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("Failed: batch.py needs Python 3.10 or newer, this is %d.%d." % sys.version_info[:2])

ROOT = Path(__file__).resolve().parent
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 130


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; 2/3 is one, the second of three")
    return int(found[1]), int(found[2])


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="batch.py",
        description="Draws a workflow once for each row of changes to it. Run again, it goes on"
                    " where it was.",
    )
    found.add_argument(
        "workflow", help="the workflow in API format (in ComfyUI's menu: File > Export (API))"
    )
    found.add_argument(
        "rows", help='a file of lines such as {"id": "0001", "4.text": "a red house", "7.seed": 5}'
    )
    found.add_argument(
        "out",
        help="the folder for the pictures, on this machine; one that all machines share is"
        " file:///..., and a bucket that all can write s3://, gs:// or abfs://",
    )
    found.add_argument("--workers", nargs=2, type=int, default=(1, 0), metavar=("MIN", "MAX"),
                       help="how many at once; 0 as MAX: as many as the machines have room for")
    found.add_argument(
        "--gpus", type=float, help="of each worker; 1 where the machines have any, else 0"
    )
    found.add_argument(
        "--cpus", type=float, help="of each worker, which computes with as many threads"
    )
    found.add_argument(
        "--address",
        default="auto",
        help="of the Ray cluster; without one, Ray is started on this machine",
    )
    found.add_argument(
        "--shard",
        type=parse_shard,
        default=(1, 1),
        metavar="I/N",
        help="draw only the I-th of N parts of the rows, as each of several clusters does",
    )
    found.add_argument(
        "--check",
        action="store_true",
        help="say what each machine is and which models and node packs of the workflow it lacks;"
             " draw nothing",
    )
    # of earlier versions
    found.add_argument("--fetch-models", action="store_true", help=argparse.SUPPRESS)
    return found


def workers_of(given: list[int]) -> tuple[int, int]:
    """(fewest, most) as given. Raises ValueError."""
    fewest, most = given
    if fewest < 1 or 0 != most < fewest:
        raise ValueError(
            f"--workers {fewest} {most}: at least 1, and as many or more behind it, or 0 for all"
            " that fit."
        )
    return fewest, most


def stop(*_):
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> int:
    # Ray would send it to each worker
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    pack = types.ModuleType("featherweight")
    pack.__path__ = [str(ROOT)]
    sys.modules.setdefault("featherweight", pack)
    from featherweight.cluster.batch import Batch
    from featherweight.cluster.batch_progress import duration
    from featherweight.cluster.comfyui_install import MachineError, own_comfyui
    from featherweight.cluster.graph import read

    if options.fetch_models:
        print(
            "Failed: --fetch-models sends no files any more: share the models' folder among the"
            " machines or copy it, as docs/machines.md says.",
            flush=True,
        )
        return USAGE
    started = time.monotonic()
    # what ends and is drawn again is no error here
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    signal.signal(signal.SIGTERM, stop)
    out = options.out if "://" in options.out else os.path.abspath(options.out)
    try:
        graph = read(Path(options.workflow).read_text(encoding="utf-8"), options.workflow)
        batch = Batch(
            graph,
            options.rows,
            out,
            workers_of(options.workers),
            options.gpus,
            options.cpus,
            options.address,
            options.shard,
            own_comfyui(str(ROOT)),
        )
        if options.check:
            return DONE if batch.check() else FAILED
        counts = batch.run()
    except OSError as error:
        reason = (
            f"{error.filename} cannot be opened: {error.strerror}."
            if error.filename and error.strerror
            else error
        )
        print(f"Failed: {reason}", flush=True)
        return FAILED
    except (ValueError, MachineError) as error:
        # at once: Ray may end this process where its cluster went away
        print(f"Failed: {error}", flush=True)
        return FAILED
    except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray's answer to SIGTERM while it starts
        print(f"\nStopped. What is in {options.out} stays; run this again to go on.", flush=True)
        return STOPPED
    there = counts["there"]
    print(
        f"Done in {duration(time.monotonic() - started)}: {counts['drawn']} drawn, {there} there"
        f" before, {counts['failed']} failed, in {options.out}",
        flush=True,
    )
    return FAILED if counts["failed"] else DONE


if __name__ == "__main__":
    # a row may hold what this terminal has no letters for
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(parser().parse_args()))
