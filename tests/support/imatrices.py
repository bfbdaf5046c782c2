"""Imatrix files as stable-diffusion.cpp writes them."""
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def entry(name: str, calls: int, values) -> bytes:
    """What a `.dat` has of one weight. values: their sums over the calls."""
    return struct.pack("<i", len(name)) + name.encode() + struct.pack(
        "<ii", calls, len(values)) + np.asarray(values, "<f4").tobytes()


def write_dat(path: Path, entries: list[bytes], tail: bytes | None = None):
    """As stable-diffusion.cpp's --imat-out writes it. tail: what follows the entries."""
    tail = struct.pack("<i", 4) if tail is None else tail
    path.write_bytes(struct.pack("<i", len(entries)) + b"".join(entries) + tail)


def write_imatrix(path: Path, importance: Mapping[str, np.ndarray]):
    """importance: name -> mean square of each column."""
    write_dat(path, [entry(f"model.diffusion_model.{name}", 1, values)
                     for name, values in importance.items()])
