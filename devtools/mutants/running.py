"""Runs the tests on each mutant of a sample, in clones of one commit of the repository."""
import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from .related_tests import TestMap
from .results import Results, describe
from .sampling import ROOMS, Room, fit_sample

BUDGET = 120.0  # seconds of tests for a mutant that none of them kills
TEST_FILE_LIMIT = 900.0  # seconds that one test file may take to be used at all
MISSES = 3  # test files that are too long for what is left of the budget, until no more are tried
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/\S.*?)(?: - .*)?$", re.MULTILINE)
SUMMARY = re.compile(r"^=*\s*(?:.*?(\d+) passed)?.* in ([\d.]+)s", re.MULTILINE)


def resolve_commit(root: Path, revision: str) -> str:
    """Return the whole name of a commit."""
    run = subprocess.run(["git", "rev-parse", "--verify", f"{revision}^{{commit}}"], cwd=root,
                         capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(
            f"Failed: {revision} is not a commit of {root}. Name one that `git log` shows.")
    return run.stdout.strip()


@contextlib.contextmanager
def clone(root: Path, commit: str) -> Iterator["Clone"]:
    """Make a clone of a commit with a temporary folder of its own, and remove both in the end."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        tree = folder / "tree"
        subprocess.run(
            ["git", "clone", "--quiet", "--shared", "--no-checkout",
             str(root),
             str(tree)], check=True)
        subprocess.run(["git", "-c", "advice.detachedHead=false", "checkout", "--quiet", commit],
                       cwd=tree, check=True)
        if (root / ".dev").exists():
            (tree / ".dev").symlink_to((root / ".dev").resolve(), target_is_directory=True)
        yield Clone(tree, folder / "t")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Clone:
    """A tree that faults are planted in, one at a time."""

    def __init__(self, tree: Path, temporary: Path):
        self.tree, self.temporary, self.stopped = tree, temporary, False

    @contextlib.contextmanager
    def planted(self, file: str, source: str):
        """Give a file another content for a while."""
        path = self.tree / file
        original = path.read_bytes()
        path.write_text(source, encoding="utf-8", newline="\n")
        try:
            yield
        finally:
            path.write_bytes(original)

    def run_tests(self, *arguments: str, limit: float) -> tuple[int | None, str]:
        """Run pytest.

        Args:
            arguments: Of pytest.
            limit: Seconds after which it is ended, with every process that it has started.

        Returns:
            Its exit code, None after `limit`, and what it said.
        """
        # a mutant's kernels and verdicts are no other's
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        command = [
            sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "--color=no", *arguments
        ]
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTEST_ADDOPTS": "",
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.temporary / "cache"),
            # which does not tell a fault from a file of its size and second
            "PYTHONDONTWRITEBYTECODE": "1"
        }
        with open(self.temporary.with_suffix(".log"), "w+b") as log:
            process = subprocess.Popen(
                command,
                cwd=self.tree,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # or Ctrl-C would end the tests, as if they had failed
                start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                self.end_processes()
                process.wait()
            if self.stopped:
                raise InterruptedError(f"The tests in {self.tree} were ended.")
            log.seek(0)
            return code, log.read().decode(errors="replace")

    def stop(self):
        """End the tests that run here; `run_tests` raises then."""
        self.stopped = True
        self.end_processes()

    def end_processes(self):
        """End what was started here and still runs: all that has this clone's temporary folder,
        daemons too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self.temporary):
                    process.kill()


class Tests:
    """The tests of a commit as they are without a fault; each file is measured when it is first
    asked for."""

    def __init__(self, tree: Path, results: Results):
        self._map, self._results, self._locks = TestMap(tree), results, defaultdict(threading.Lock)

    def choose(self, clone: Clone, source: str, budget: float) -> list[str]:
        """List the test files for a mutant of `source`, fastest first: the nearest that fit into
        `budget` seconds."""
        chosen, total, misses = {}, 0.0, 0
        for file in self._map.tests_of(source):
            seconds = self._measure(clone, file)["seconds"]
            if seconds is None:
                continue
            if not chosen or total + seconds <= budget:
                chosen[file] = seconds
                total += seconds
            else:
                misses += 1
            if misses == MISSES or total >= budget:
                break
        return sorted(chosen, key=chosen.get)

    def limit(self, files: list[str]) -> float:
        """Seconds that these may take on a mutant; one that takes longer runs in a circle."""
        return 90 + 4 * sum(self._results.tests[file]["seconds"] for file in files)

    def failing(self, files: list[str]) -> list[str]:
        return [test for file in files for test in self._results.tests[file]["failing"]]

    def _measure(self, clone: Clone, file: str) -> dict:
        with self._locks[file]:
            if file not in self._results.tests:
                code, output = clone.run_tests(file, limit=TEST_FILE_LIMIT)
                summary = SUMMARY.findall(output)
                passed, seconds = summary[-1] if summary else ("", "0")
                usable = code in (0, 1) and passed
                entry = {
                    "seconds": float(seconds) if usable else None,
                    "failing": FAILED.findall(output) if usable else []
                }
                self._results.add_test(file, entry)
            return self._results.tests[file]


def run_on_mutant(clone: Clone, tests: Tests, file: str, source: str, budget: float) -> dict:
    """Run the tests that know a file on a mutant of it.

    Args:
        source: The file's content, with the fault in it.
        budget: Seconds of tests.

    Returns:
        `outcome` (killed, timeout, survived), `by` (the test that failed), `tests` (their files),
        `seconds`.
    """
    chosen = tests.choose(clone, file, budget)
    started, code, output = time.monotonic(), 0, ""
    if chosen:
        deselected = [f"--deselect={test}" for test in tests.failing(chosen)]
        with clone.planted(file, source):
            code, output = clone.run_tests("-x", *deselected, *chosen, limit=tests.limit(chosen))
    outcome = "timeout" if code is None else "killed" if code else "survived"
    failed = FAILED.findall(output) if code else []
    by = failed[0] if failed else output.strip().rpartition("\n")[2][:200] if code else ""
    return {
        "outcome": outcome, "by": by, "tests": chosen,
        "seconds": round(time.monotonic() - started, 1)
    }


def run(root: Path, sample: dict, revision: str, out: Path, rooms: dict = ROOMS,
        budget: float = BUDGET, processes: int = 1, limit: int | None = None) -> dict:
    """Run the tests on the sample's mutants that have no result yet.

    Args:
        root: Of the repository.
        revision: The commit whose code and tests are used.
        out: File of the results.
        rooms: Folders of each room of the sample.
        budget: Seconds of tests for a mutant.
        processes: Mutants at once.
        limit: At most so many of each room.

    Returns:
        The content of `out`.
    """
    commit = resolve_commit(root, revision)
    results = Results(out, commit, sample["seed"])
    with contextlib.ExitStack() as stack:
        clones, free, jobs = (
            [stack.enter_context(clone(root, commit)) for _ in range(processes)],
            queue.SimpleQueue(),
            [],
        )
        for each in clones:
            free.put(each)
        tree = clones[0].tree
        tests = Tests(tree, results)
        for name, folders in rooms.items():
            room = Room(tree, folders)
            pending = [(sampled, mutant) for sampled, mutant in fit_sample(sample, name, room)
                       if mutant and not results.has(name, sampled)]
            for sampled, mutant in pending[:limit]:
                entry = {
                    "room": name, "sampled": sampled.to_json(), "mutant": mutant.to_json(),
                    "replaced": room.locate(sampled) is None, "line": room.spots[mutant.place].line
                }
                jobs.append((entry, mutant.place.file, room.plant(mutant)))

        def work(entry: dict, file: str, source: str):
            mine = free.get()
            try:
                entry |= run_on_mutant(mine, tests, file, source, budget)
            finally:
                free.put(mine)
            results.add_mutant(entry)
            print(describe(entry), flush=True)

        pool = stack.enter_context(ThreadPoolExecutor(processes))
        running = [pool.submit(work, *job) for job in jobs]
        try:
            for each in running:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for each in clones:
                each.stop()
            raise
    if unusable := [file for file, entry in results.tests.items() if entry["seconds"] is None]:
        print(f"Not usable without a mutant either: {', '.join(unusable)}")
    return results.content()
