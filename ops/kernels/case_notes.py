"""What models on this machine have asked of kernels, noted for the trial at the next start of ComfyUI.

A file of JSON in the user's cache: {"cases": [["linear", "Q4_K", "bfloat16", null], ...], "shapes": {"Q4_K": [[3072, 12288],
...], ...}}, with the latest last and the oldest dropped where they are too many.
"""
import math
import re
import threading
from pathlib import Path
from typing import Any

import torch

from .own_files import cache_folder, private_folder, read_private_json, write_private_json
from .timing import MOST_SHAPES, TIMED
from .verdicts import Case, dtype_name

MOST_CASES = 200
MOST_FORMATS = 60
MOST_LENGTH = 1 << 31  # of a side of a weight
FORMAT = re.compile(r"\w{1,40}")
DTYPES = frozenset(map(dtype_name, (torch.float32, torch.float16, torch.bfloat16, torch.int8)))

Shapes = dict[str, set[tuple[int, int]]]  # name of a format -> (N, K) of weights

_adding = threading.Lock()


def trials_folder() -> Path:
    """Where the notes lie, and what only one trial may hold at a time."""
    return private_folder(cache_folder() / "trials")


def read_notes() -> tuple[list[Case], Shapes]:
    """What is noted. A damaged part counts as none."""
    match read_private_json(_path()):
        case {"cases": list(cases), "shapes": dict(shapes)}:
            return [Case.of_json(parts) for parts in cases if _is_case(parts)], {
                name: {tuple(shape) for shape in sizes if _is_shape(shape)} for name, sizes in shapes.items()
                if FORMAT.fullmatch(name) and isinstance(sizes, list)}
    return [], {}


def add_notes(cases: list[Case], shapes: Shapes):
    """Adds what a model asks for. Of a format's shapes those with the most values are kept."""
    with _adding:
        noted, noted_shapes = read_notes()
        all_cases = list(dict.fromkeys([*noted, *(case for case in cases if case.op in TIMED)]))[-MOST_CASES:]
        all_shapes = {name: noted_shapes.get(name, set()) | shapes.get(name, set()) for name in [*noted_shapes, *shapes]}
        all_shapes = {name: set(sorted(sizes, key=math.prod)[-MOST_SHAPES:])
                      for name, sizes in list(all_shapes.items())[-MOST_FORMATS:]}
        if (all_cases, all_shapes) != (noted, noted_shapes):
            write_private_json(_path(), {"cases": [case.as_json() for case in all_cases],
                                         "shapes": {name: sorted(sizes) for name, sizes in all_shapes.items()}})


def _path() -> Path:
    return trials_folder() / "notes.json"


def _is_case(parts: Any) -> bool:
    match parts:
        case [str(op), str() | None as name, str(dtype), str() | None as value_dtype]:
            return (op in TIMED and (name is None or FORMAT.fullmatch(name) is not None)
                    and (name is None) == (op == "int8_tokens")
                    and dtype in DTYPES and (value_dtype is None or value_dtype in DTYPES))
    return False


def _is_shape(shape: Any) -> bool:
    match shape:
        case [int(rows), int(columns)]:
            return 0 < rows <= MOST_LENGTH and 0 < columns <= MOST_LENGTH
    return False
