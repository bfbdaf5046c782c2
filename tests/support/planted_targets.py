"""Targets of the fuzzer that break one rule each, for an input with a 9 in it."""
import json
import os
import socket
import time
from functools import partial
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from devtools.fuzz import guard
from devtools.fuzz.strategies import changed
from devtools.fuzz.targets import Maker, Target

SENTENCE = "planted.txt does not begin as it should."


def compute():
    begun = time.process_time()
    while time.process_time() < begun + guard.SECONDS + 0.1:
        pass


def key_error():
    raise KeyError("planted")


def with_a_9(data: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from([data, data[:-1], data[1:], data + b"9"])


def text_target(fault, message: str, changes, folder: Path) -> Target:
    def read(path: Path):
        data = path.read_bytes()
        if b"9" in data:
            fault()
        if not data.startswith(b"begin"):
            raise OSError(message)

    return Target(folder, [b"begin: 1, end: 2"], read, (OSError,), "planted.txt", changes=changes)


def index_target(dtype: str, size: int, folder: Path) -> Target:
    """Indices of rows that a writer stores in a dtype that torch cannot compare, and changes
    nothing else."""
    indices = torch.arange(32, dtype=torch.int32)
    sample = save({"L.weight_packed": torch.ones(8, 4, dtype=torch.int32),
                   "L.weight_scale": torch.ones(8, 2), "L.weight_zero_point": torch.ones(8, 2),
                   "L.weight_g_idx": indices})

    def read(path: Path):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        try:
            found = json.loads(data[8:8 + length])["L.weight_g_idx"]
            start, end = found["data_offsets"]
            stored = data[8 + length:][start:end]
            values = [int.from_bytes(stored[at:at + size], "little")
                      for at in range(0, len(stored), size)]
            is_planted = found["dtype"] == dtype and values == indices.tolist()
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if is_planted:
            raise NotImplementedError(dtype)

    return Target(folder, [sample], read, (), "planted.txt")


def nothing():
    pass


FAULTS = {"error": key_error, "allocation": lambda: bytearray(8 << 30), "abort": os.abort,
          "hang": lambda: time.sleep(1000), "nothing": nothing}
BREACHES = {
    "memory": lambda: list(range(10**5)), "time": compute,
    "wrote": lambda: (Path(__file__) / "x").write_text(""),
    "opened": lambda: Path("/etc/passwd").read_bytes(), "process": lambda: os.system("true"),
    "network": lambda: socket.create_connection(("127.0.0.1", 9))}
MESSAGES = {"name": "It does not begin as it should.", "sentence": "no"}
TARGETS = {name: Maker("a planted fault", make) for name, make in {
    **{name: partial(text_target, fault, SENTENCE, changed) for name, fault in FAULTS.items()},
    **{name: partial(text_target, fault, SENTENCE, with_a_9) for name, fault in BREACHES.items()},
    **{name: partial(text_target, nothing, text, with_a_9) for name, text in MESSAGES.items()},
    **{f"uint{8 * size}": partial(index_target, f"U{8 * size}", size) for size in (2, 4, 8)}
}.items()}
