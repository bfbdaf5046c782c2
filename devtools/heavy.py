"""Runs the heavy tests, and those of which a whole run takes a few cases, in pieces, a folder on
each core, and goes on where it stopped.

A piece that has passed is not run again while the pack, its tests and what both share are the same
bytes. What each took stands in .dev/heavy.json.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from devtools import ROOT

RECORD = ROOT / ".dev" / "heavy.json"
PRODUCT = ("__init__.py", "child_process.py", "cluster", "loaders", "nodes", "ops")
SHARED = ("tests/support", "tests/conftest.py", "tests/pytest.ini", "devtools", "demo_model")
MARKS = "heavy or more_with_heavy"
GIB = 1 << 30
MOST_GIB = 10  # of memory that a piece may take, with all its processes
LOOK_SECONDS = 1
NOTHING_TO_RUN = 5  # pytest's exit code


def pieces() -> dict[str, list[Path]]:
    """Return the folders of tests that have heavy ones -> these files."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.heavy" in text or "mark.more_with_heavy" in text or "mark.parametrize" in text:
            folder = path.relative_to(ROOT).parent
            found.setdefault(Path(*folder.parts[:3]).as_posix(), []).append(path)
    return found


def state(files: list[Path]) -> str:
    """Return a digest of the pack, of a piece's files, and of what all tests share."""
    digest = hashlib.sha256()
    for place in (*PRODUCT, *SHARED):
        path = ROOT / place
        files = [*files, *([path] if path.is_file() else path.rglob("*"))]
    for path in sorted(set(files)):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(os.path.relpath(path, ROOT).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_piece(name: str, files: list[Path], most_bytes: float) -> dict:
    """Run the heavy tests of some files, and end them where they take too much memory.

    Returns: whether they `passed`, the `seconds`, the most `bytes` in memory, and pytest's last
        line or why they were ended (`result`).
    """
    started, peak, lines = time.monotonic(), 0, []
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "--heavy", "-m", MARKS, "-p", "no:xdist",
         *map(str, files)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})

    def show():
        for line in process.stdout or ():
            lines.append(line.strip())
            print(f"{name}: {line}", end="", flush=True)

    reader = threading.Thread(target=show)
    reader.start()
    result = ""
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        if peak > most_bytes and not result:
            result = f"ended: it took more than {most_bytes / GIB:g} GiB of memory"
            end(process.pid)
        time.sleep(LOOK_SECONDS)
    reader.join()
    return {"passed": not result and process.returncode in (0, NOTHING_TO_RUN),
            "seconds": round(time.monotonic() - started), "bytes": peak,
            "result": result or next(filter(None, reversed(lines)), "")}


def read_record() -> dict[str, dict]:
    """Return the name of each piece that has run -> its row."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def memory_of(number: int) -> int:
    """Return the bytes that a process and all its children have for themselves."""
    total = 0
    for process in family(number):
        try:
            memory = process.memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
        except psutil.NoSuchProcess:
            pass
    return total


def end(number: int):
    """End a process and all its children."""
    for process in family(number):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def family(number: int) -> list[psutil.Process]:
    """Return a process and all its children, none where it has ended."""
    try:
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def main(arguments: list[str]) -> int:
    """Run the pieces that have not passed as they are now, and print the table of all."""
    parser = argparse.ArgumentParser(prog="python3 dev.py test --heavy")
    parser.add_argument("pieces", nargs="*", metavar="FOLDER", help="only these; default: all")
    parser.add_argument("--sixth", type=int, choices=range(6), help="each sixth folder, from this")
    parser.add_argument("--at-once", type=int, metavar="N",
                        help="pieces at the same time; default: one for each core, by the memory")
    parser.add_argument("--most-gib", type=float, default=MOST_GIB,
                        help="memory of a piece, above which it is ended")
    chosen, found = parser.parse_args(arguments), pieces()
    if unknown := set(chosen.pieces) - found.keys():
        parser.error(f"no heavy tests are in {', '.join(unknown)}; they are in {', '.join(found)}")
    wanted = chosen.pieces or [name for index, name in enumerate(found)
                               if chosen.sixth in (None, index % 6)]
    most_bytes, lock = chosen.most_gib * GIB, threading.Lock()
    fitting = int(psutil.virtual_memory().total / most_bytes)
    at_once = chosen.at_once or max(1, min(os.cpu_count() or 1, fitting))

    def run(name: str):
        now, row = state(found[name]), read_record().get(name, {})
        if row.get("passed") and row["state"] == now:
            return
        print(f"Heavy tests of {name}", flush=True)
        row = {"state": now, **run_piece(name, found[name], most_bytes)}
        with lock:
            record = read_record() | {name: row}
            partial = RECORD.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(record, indent=1))
            partial.replace(RECORD)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, wanted))
    record = read_record()
    print("\n| piece | seconds | GB | result |\n|---|---|---|---|")
    for name, row in sorted(record.items()):
        is_now = name in found and row["state"] == state(found[name])
        print(f"| {name} | {row['seconds']} | {row['bytes'] / 1e9:.1f} | {row['result']}"
              f"{'' if is_now else ' (of an earlier state)'} |")
    return int(any(not record[name]["passed"] for name in wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
