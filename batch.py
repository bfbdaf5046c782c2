"""Renders many rows of one workflow, on one machine or on a Ray cluster.

    python custom_nodes/ComfyUI-Featherweight/batch.py WORKFLOW_API.json ROWS.jsonl OUT
"""
import argparse
import io
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
    """Returns (i, n) of "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"invalid shard {text!r}, expected I/N such as 2/3")
    return int(match[1]), int(match[2])


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="batch.py",
        description="Runs a workflow once for each row of changes to it. Run the same command"
                    " again to continue where it stopped.",
    )
    parser.add_argument(
        "workflow", help="the workflow in API format (in ComfyUI's menu: File > Export (API))"
    )
    parser.add_argument(
        "rows", help='a file of lines such as {"id": "0001", "4.text": "a red house", "7.seed": 5}'
    )
    parser.add_argument(
        "out",
        help="the folder for the images: a path on this machine, file:///... for a folder that"
        " all machines share, or a bucket that all can write to: s3://, gs:// or abfs://",
    )
    parser.add_argument("--workers", nargs=2, type=int, default=(1, 0), metavar=("MIN", "MAX"),
                        help="how many run at once; MAX 0: as many as fit on the machines")
    parser.add_argument(
        "--gpus", type=float, help="GPUs of each worker; default: 1 if any machine has one, else 0"
    )
    parser.add_argument(
        "--cpus", type=float, help="processors of each worker, which uses as many threads"
    )
    parser.add_argument(
        "--address",
        default="auto",
        help="the address of the Ray cluster; default: the cluster that this machine belongs to,"
        " else Ray is started here",
    )
    parser.add_argument(
        "--shard",
        type=parse_shard,
        default=(1, 1),
        metavar="I/N",
        help="run only the I-th of N parts of the rows, when several clusters share them",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="list the machines, and the models and node packs of the workflow that each lacks;"
             " run nothing",
    )
    # an option of earlier versions, which gets a message of its own
    parser.add_argument("--fetch-models", action="store_true", help=argparse.SUPPRESS)
    return parser


def check_workers(limits: list[int]) -> tuple[int, int]:
    """Returns (minimum, maximum) as given. Raises ValueError."""
    minimum, maximum = limits
    if minimum < 1 or 0 != maximum < minimum:
        raise ValueError(
            f"--workers {minimum} {maximum}: MIN must be at least 1, and MAX at least MIN, or 0 for"
            " as many as fit."
        )
    return minimum, maximum


def stop(*_):
    """Ends the batch on SIGTERM as Ctrl-C does."""
    raise KeyboardInterrupt


def import_pack():
    """Makes the modules of this pack those of the package `featherweight`."""
    # Ray sends sys.path to each worker
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    pack = types.ModuleType("featherweight")
    pack.__path__ = [str(ROOT)]
    sys.modules.setdefault("featherweight", pack)
    # a worker that ends is replaced, so Ray's own messages about it would mislead
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def run(options: argparse.Namespace) -> int:
    """Runs the command. Returns its exit code."""
    import_pack()
    from featherweight.cluster.batch_progress import duration
    from featherweight.cluster.batch_run import Batch
    from featherweight.cluster.comfyui_install import MachineError, own_comfyui
    from featherweight.cluster.workflow_graph import read

    if options.fetch_models:
        print(
            "Failed: --fetch-models sends no files any more: share the models' folder among the"
            " machines or copy it, as docs/machines.md says.",
            flush=True,
        )
        return USAGE
    started = time.monotonic()
    signal.signal(signal.SIGTERM, stop)
    out = options.out if "://" in options.out else os.path.abspath(options.out)
    try:
        graph = read(Path(options.workflow).read_text(encoding="utf-8"), options.workflow)
        batch = Batch(
            graph,
            options.rows,
            out,
            check_workers(options.workers),
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
        # flushed at once: Ray may end this process when its cluster is lost
        print(f"Failed: {error}", flush=True)
        return FAILED
    except (KeyboardInterrupt, SystemExit):  # Ray turns a SIGTERM while it starts into SystemExit
        print(f"\nStopped. What is in {options.out} stays; run this again to go on.", flush=True)
        return STOPPED
    print(
        f"Done in {duration(time.monotonic() - started)}: {counts['drawn']} generated,"
        f" {counts['done']} already done, {counts['failed']} failed, in {options.out}",
        flush=True,
    )
    return FAILED if counts["failed"] else DONE


def serve():
    """Renders the runs of *Run on Ray*, which ComfyUI writes to this process."""
    import_pack()
    from featherweight.cluster.comfyui_install import own_comfyui
    from featherweight.cluster.run_server import serve_runs

    serve_runs(own_comfyui(str(ROOT)))


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        sys.exit(serve())
    # a row may hold characters that this terminal cannot show
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(make_parser().parse_args()))
