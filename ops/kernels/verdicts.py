"""What trials have found out about kernels, kept in a file of the user's cache.

A verdict is a dict that JSON has. "verdict" is one of `VERDICTS`; "why" a sentence where it is not right; of a kernel "case" is
the text of the `Case`, "rows" the least and most rows of input that it takes, and "times" the seconds of the kernel and of
torch for each number of rows it was timed at ("" where there are none). "at" is when it was found out, in seconds since 1970.
"""
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .own_files import read_private_json, write_private_json

# "tried" of a `Case`: all kernels of a backend have a verdict for it. "refused": the kernel or its compiler raised something.
# "skipped": not tried, because too many of its backend crashed. "memory": there was no room for it, which is not kept.
# "killed": another program ended its process, as a system without memory does.
VERDICTS = frozenset(("right", "slower", "wrong", "crashed", "hung", "killed", "refused", "skipped", "tried", "memory"))
# What may mend itself without a change of the key is tried again after so many seconds: a compiler may be installed, and the
# machine may have more time and memory.
WEEK = 7 * 86400
FORGOTTEN = {"refused": WEEK, "hung": WEEK, "killed": WEEK, "skipped": WEEK, "memory": 0}
ROWS_OF = ", rows "  # between the text of a case and the rows of a kernel
ROWS = re.compile(r"(?:[1-9][0-9]{0,17})?")  # of a time: a number as `str` writes it, or none


class Case(NamedTuple):
    """What a layer asks for. format: a name, None for "int8_tokens". The rest as in `Kernel`."""
    op: str
    format: str | None
    dtype: torch.dtype
    value_dtype: torch.dtype | None

    def __str__(self) -> str:
        return (f"{self.op} of {self.format or 'any format'} to {dtype_name(self.dtype)}"
                + (f" by way of {dtype_name(self.value_dtype)}" if self.value_dtype else ""))

    def as_json(self) -> list:
        return [self.op, self.format, dtype_name(self.dtype), self.value_dtype and dtype_name(self.value_dtype)]

    @classmethod
    def of_json(cls, parts: list) -> "Case":
        op, name, dtype, value_dtype = parts
        return cls(op, name, getattr(torch, dtype), value_dtype and getattr(torch, value_dtype))


def kernel_text(case: Case, rows: list) -> str:
    """What the verdict on a kernel is kept under. rows: the least and most that it takes."""
    return f"{case}{ROWS_OF}{rows[0]} to {rows[1] or 'any'}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Proven(NamedTuple):
    """A kernel that is right. rows: the least and most it takes; most is None for any number. times: as in a verdict."""
    backend: str
    rows: tuple[int, int | None]
    times: dict[str, list[float]]

    @property
    def share(self) -> float:
        """Its time, as a share of torch's."""
        return math.prod(kernel / torch for kernel, torch in self.times.values()) ** (1 / max(1, len(self.times)))

    def is_faster(self, tokens: int | None) -> bool:
        """Whether it takes so many rows and was faster than torch at the numbers timed next to it, above and below."""
        least, most = self.rows
        if tokens is not None and (tokens < least or most is not None and tokens > most):
            return False
        if tokens is None or "" in self.times:
            return self.share <= 1
        timed = sorted(map(int, self.times))
        beside = {max((rows for rows in timed if rows <= tokens), default=None),
                  min((rows for rows in timed if rows >= tokens), default=None)} - {None}
        return all(self.times[str(rows)][0] < self.times[str(rows)][1] for rows in beside)


class Verdicts:
    """Those about one backend on one kind of device: text of a case, and "rows" of a kernel behind it -> verdict.

    folder: where they are kept. key: all that they depend on; with another value of it they are others.
    """

    def __init__(self, folder: Path, key: dict[str, str]):
        self.key = key
        self._path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
        self.known: dict[str, dict] = {}

    def read(self):
        """Adds those of the file to what is known here. A case of which something is forgotten is not "tried".

        A file that is damaged, belongs to others or can be written by them counts as none.
        """
        found = self._in_file()
        forgotten = {text for text, verdict in found.items()
                     if time.time() - verdict["at"] >= FORGOTTEN.get(verdict["verdict"], math.inf)}
        forgotten |= {text.partition(ROWS_OF)[0] for text in forgotten}
        self.known = {**{text: verdict for text, verdict in found.items() if text not in forgotten}, **self.known}

    def _in_file(self) -> dict[str, dict]:
        match read_private_json(self._path):
            case {"key": self.key, "verdicts": dict(verdicts)}:
                return {text: verdict for text, verdict in verdicts.items() if is_verdict(verdict)}
        return {}

    def add(self, text: str, verdict: dict):
        """Written at once, so that it outlives what may happen next; and known here even if it cannot be written."""
        self.known = {**self.known, text: verdict | {"at": time.time()}}  # a new one: others may be reading it
        write_private_json(self._path, {"key": self.key, "verdicts": {**self._in_file(), **self.known}})


def is_verdict(value) -> bool:
    """Whether something read is a verdict of the form that this module's docstring tells."""
    if not isinstance(value, dict) or str(value.get("verdict")) not in VERDICTS or not _is_number(value.get("at", 0)):
        return False
    if value["verdict"] not in ("right", "slower"):
        return isinstance(value.get("why", ""), str) and "at" in value
    rows, times = value.get("rows", [1, None]), value.get("times", {})
    return ("at" in value and isinstance(value.get("case", ""), str) and isinstance(rows, list) and len(rows) == 2
            and type(rows[0]) is int and (rows[1] is None or type(rows[1]) is int)
            and isinstance(times, dict) and all(_is_time(*item) for item in times.items()))


def _is_time(rows, seconds) -> bool:
    return ROWS.fullmatch(rows) is not None and isinstance(seconds, list) and len(seconds) == 2 and all(
        _is_number(value) and value > 0 for value in seconds)


def _is_number(value) -> bool:
    """Of a size that can be computed with."""
    return isinstance(value, (int, float)) and abs(value) < 1e15
