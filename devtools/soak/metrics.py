"""What a server holds of the machine at a quiet moment: nothing runs, no model is loaded, what can
be freed is."""
import os
import time
from pathlib import Path

import psutil

from devtools.host.server import Server

# seconds that kernels may take which are compiled and tried beside the prompts, with files of their
# own
TRIALS = 300


def read(server: Server, turn: int) -> dict[str, float]:
    """Ask the server to let go of all it holds, and count what is left.

    rss, private: MB of the process. tensors: MB of tensors that Python still has; objects: all that
    its collector knows.
    mapped: files of the soak that are mapped. open: files that are open, its log among them; not
    the clients' sockets, which close a moment after their answer. temporary: files in its temporary
    folders, and parts of files anywhere below its folder. threads.
    """
    end = time.monotonic() + TRIALS
    while temporary_files(server.base) and time.monotonic() < end:
        time.sleep(0.2)
    server.post("/free", {"unload_models": True, "free_memory": True})
    run = server.queue({"1": {"class_type": "SoakQuiet", "inputs": {"turn": 2 * turn}}})
    server.post("/free", {"unload_models": True, "free_memory": True})
    run = server.queue({"1": {"class_type": "SoakQuiet", "inputs": {"turn": 2 * turn + 1}}})
    objects, tensors = map(int, run.outputs["1"]["text"])
    server.post("/history", {"clear": True})
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    with process.oneshot():
        memory = process.memory_full_info()
        mapped = {
            entry.path for entry in process.memory_maps()
            if entry.path.startswith(str(server.base / "models"))
        }
        files = len(process.open_files())
        threads = process.num_threads()
    return {
        "rss": memory.rss / 1e6, "private": memory.uss / 1e6, "tensors": tensors / 1e6,
        "objects": objects, "mapped": len(mapped), "open": files, "threads": threads,
        "temporary": temporary_files(server.base)
    }


def temporary_files(base: Path) -> int:
    found = [
        path for folder in ("temp", "tmp") for path in (base / folder).rglob("*") if path.is_file()
    ]
    return len(found) + sum(
        name.endswith(".part") for _, _, names in os.walk(base) for name in names
    )
