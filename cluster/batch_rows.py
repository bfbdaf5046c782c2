"""The rows of a batch: lines of JSON, each of them a name and changes to one workflow, and which of
them are done already."""
import concurrent.futures
import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .graph import GraphError, apply_changes, canonical, digest
from .picture_store import Store

NAME = re.compile(
    r'[^./\\:*?"<>|\x00-\x1f\ud800-\udfff][^/\\:*?"<>|\x00-\x1f\ud800-\udfff]{0,149}(?<![. ])')
# of an id; a file system takes 255, and node, number and what is half-written stand behind it
NAME_BYTES = 180
# at once: a bucket answers late, a disk gives more when it is asked for more
READERS = {"bucket": 32, "folder": 8}


@dataclass
class RowScan:
    """What a look at some lines found.

    names: (number of the line, the row's id) of every row. left: (id, changes as JSON, stamp,
    number of the line) of those to be drawn. done: numbers of the others' lines. bad: (number of
    the line, what is wrong with it).
    """
    names: list[tuple[int, str]] = field(default_factory=list)
    left: list[tuple[str, str, str, int]] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line that is not empty."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf")


def chunks(found: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last of them shorter."""
    chunk = []
    for item in found:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def row(line: bytes) -> tuple[str, dict]:
    """(id, changes) of a line. Raises GraphError."""
    try:
        changes = json.loads(line)
    except ValueError as error:
        raise GraphError(f"is no JSON: {error}") from error
    except RecursionError as error:
        raise GraphError("has lists or objects too deep inside each other") from error
    if not isinstance(changes, dict):
        raise GraphError('is no row; {"id": "0001", "4.text": "a red house"} is one')
    name = changes.pop("id", None)
    if type(name) is int:
        name = str(name)
    if not isinstance(name, str):
        raise GraphError('has no "id", which names its pictures')
    size = len(name.encode(errors="surrogatepass"))
    if size > NAME_BYTES:
        raise GraphError(
            f"has the id {name[:200]!r}, which cannot be a file's name: it takes {size}"
            f" bytes, {NAME_BYTES} are allowed")
    if not NAME.fullmatch(name):
        raise GraphError(f"has the id {name!r}, which cannot be a file's name")
    return name, changes


def changes_of(path: str) -> Iterator[dict]:
    """The changes of each line that is a row."""
    for _, line in lines(path):
        with contextlib.suppress(GraphError):
            yield row(line)[1]


def scan_rows(out: str, graph: dict, some: list[tuple[int, bytes]]) -> RowScan:
    """Which of these lines are to be drawn. out: see `Store`. graph: the workflow. Runs on any
    machine that sees the store."""
    found, store, workflow = RowScan(), Store(out), digest(graph)
    asked = []
    for number, line in some:
        try:
            name, changes = row(line)
        except GraphError as error:
            found.bad.append((number, str(error)))
            continue
        found.names.append((number, name))
        text = canonical(changes)
        asked.append(
            (name, text, hashlib.sha256(f"{workflow} {text}".encode()).hexdigest(), number))
    at_once = READERS["bucket" if store.files else "folder"]
    with concurrent.futures.ThreadPoolExecutor(at_once) as readers:
        parts = chunks(asked, len(asked) // at_once + 1)
        done = [
            one for part in readers.map(
                lambda some: [store.done(name, stamp) for name, _, stamp, _ in some], parts)
            for one in part
        ]
    for item, is_done in zip(asked, done):
        if is_done:
            found.done.append(item[3])
            continue
        try:
            apply_changes(graph, json.loads(item[1]))
            found.left.append(item)
        except GraphError as error:
            found.bad.append((item[3], f"({item[0]}): {error}"))
    return found


class RowIndex:
    """All rows of a batch, put together from looks. shard: (i, n), of n parts the i-th, from 1."""

    def __init__(self, shard: tuple[int, int] = (1, 1)):
        self.shard = shard
        # id, as file systems compare it -> number of its line; ids of this part
        self.first, self.names = {}, set()
        self.bad, self.left, self.there, self.count = [], [], 0, 0

    def add(self, found: RowScan):
        """The next lines' look, in their order."""
        twice = {}
        for number, name in found.names:
            first = self.first.setdefault(name.casefold(), number)
            if first != number:
                twice[number] = f"has the id {name!r}, as line {first} has"
        numbers = sorted({number for number, _ in (*found.names, *found.bad)})
        mine = set(numbers[(self.shard[0] - 1 - self.count) % self.shard[1]::self.shard[1]])
        self.count += len(numbers)
        self.names.update(name for number, name in found.names
                          if number not in twice and number in mine)
        self.bad += [
            item for item in sorted({**dict(found.bad), **twice}.items()) if item[0] in mine
        ]
        self.there += sum(number not in twice and number in mine for number in found.done)
        self.left += [item for item in found.left if item[3] not in twice and item[3] in mine]
