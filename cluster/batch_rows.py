"""Reads the rows of a batch and scans which of them are done already.

A row is a line of JSON: an id and changes to the workflow.
"""
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .picture_store import Store
from .workflow_graph import GraphError, apply_changes, canonical, digest

NAME = re.compile(
    r'[^./\\:*?"<>|\x00-\x1f\ud800-\udfff][^/\\:*?"<>|\x00-\x1f\ud800-\udfff]{0,149}(?<![. ])')
NAME_BYTES = 180  # of an id; file systems allow 255, and node, number and ".part" follow the id
READERS = {"bucket": 32, "folder": 8}  # threads: buckets are slow to answer, disks like a queue


@dataclass
class RowScan:
    """The result of scanning some lines.

    Args:
        names: (line number, row's id) of every row.
        pending: (row's id, changes as JSON, stamp, line number) of the rows to render.
        done: line numbers of the rows that are done.
        invalid: (line number, what is wrong with the line).
    """
    names: list[tuple[int, str]] = field(default_factory=list)
    pending: list[tuple[str, str, str, int]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    invalid: list[tuple[int, str]] = field(default_factory=list)


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of each line that is not empty."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf")


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yields lists of `size` items, the last of them shorter."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def parse_row(line: bytes) -> tuple[str, dict]:
    """Returns (id, changes) of a line. Raises GraphError."""
    try:
        changes = json.loads(line)
    except ValueError as error:
        raise GraphError(f"is not valid JSON: {error}") from error
    except RecursionError as error:
        raise GraphError("has lists or objects that are nested too deep") from error
    if not isinstance(changes, dict):
        raise GraphError(
            'is not a row: expected an object such as {"id": "0001", "4.text": "a red house"}')
    name = changes.pop("id", None)
    if type(name) is int:
        name = str(name)
    if not isinstance(name, str):
        raise GraphError('has no "id", which names its images')
    size = len(name.encode(errors="surrogatepass"))
    if size > NAME_BYTES:
        raise GraphError(
            f"has the id {name[:200]!r}, which cannot be a file's name: it takes {size}"
            f" bytes, {NAME_BYTES} are allowed")
    if not NAME.fullmatch(name):
        raise GraphError(f"has the id {name!r}, which cannot be a file's name")
    return name, changes


def read_changes(path: str) -> Iterator[dict]:
    """Yields the changes of each line that is a row."""
    for _, line in read_lines(path):
        with contextlib.suppress(GraphError):
            yield parse_row(line)[1]


def scan_rows(out: str, graph: dict, lines: list[tuple[int, bytes]]) -> RowScan:
    """Finds which rows are done.

    Args:
        out: see `Store`.
        graph: the workflow.
        lines: (number, line) each.
    """
    scan = RowScan()
    store = Store(out)
    workflow = digest(graph)
    rows = []
    for number, line in lines:
        try:
            name, changes = parse_row(line)
        except GraphError as error:
            scan.invalid.append((number, str(error)))
            continue
        scan.names.append((number, name))
        text = canonical(changes)
        stamp = hashlib.sha256(f"{workflow} {text}".encode()).hexdigest()
        rows.append((name, text, stamp, number))

    def are_done(chunk: list) -> list[bool]:
        return [store.is_done(name, stamp) for name, _, stamp, _ in chunk]

    threads = READERS["bucket" if store.bucket else "folder"]
    with concurrent.futures.ThreadPoolExecutor(threads) as readers:
        results = readers.map(are_done, chunks(rows, len(rows) // threads + 1))
        done = list(itertools.chain.from_iterable(results))
    for row, is_done in zip(rows, done):
        name, text, _, number = row
        if is_done:
            scan.done.append(number)
            continue
        try:
            apply_changes(graph, json.loads(text))
            scan.pending.append(row)
        except GraphError as error:
            scan.invalid.append((number, f"({name}): {error}"))
    return scan


class RowIndex:
    """All rows of one shard of a batch, put together from scans.

    Args:
        shard: (i, n): the i-th of n parts, from 1.
    """

    def __init__(self, shard: tuple[int, int] = (1, 1)):
        self.shard = shard
        self.lines: dict[str, int] = {}  # id, as file systems compare it -> number of its line
        self.names: set[str] = set()  # ids of this shard
        self.invalid: list[tuple[int, str]] = []
        self.pending: list[tuple[str, str, str, int]] = []
        self.done = 0
        self.count = 0  # lines of all shards

    def add(self, scan: RowScan):
        """Adds the scan of the next lines, in the order of the file."""
        repeated = {}
        for number, name in scan.names:
            first = self.lines.setdefault(name.casefold(), number)
            if first != number:
                repeated[number] = f"has the id {name!r}, as line {first} has"
        numbers = sorted({number for number, _ in (*scan.names, *scan.invalid)})
        index, count = self.shard
        own = set(numbers[(index - 1 - self.count) % count::count])
        self.count += len(numbers)
        own_rows = own - repeated.keys()
        self.names.update(name for number, name in scan.names if number in own_rows)
        invalid = {**dict(scan.invalid), **repeated}
        self.invalid += [(number, invalid[number]) for number in sorted(invalid) if number in own]
        self.done += len(own_rows.intersection(scan.done))
        self.pending += [row for row in scan.pending if row[3] in own_rows]
