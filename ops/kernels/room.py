"""Whether a device has room for a trial beside what it works at."""
import math
import re
import time
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")  # of Linux
BUSY = 0.5  # of one core
LOOK_SECONDS = 1.0  # between two looks, at least


def free_bytes(device: torch.device) -> float:
    """Of a device; infinity where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = re.search(r"^MemAvailable: *(\d+) kB$", MEMORY.read_text(), re.MULTILINE) if MEMORY.is_file() else None
    return int(found[1]) * 1024 if found else math.inf


class OwnWork:
    """What this process takes of the processor: a trial beside it would slow it down, and be told wrong times."""

    def __init__(self):
        self._looked, self._used, self._was_busy = time.monotonic(), time.process_time(), True

    def is_busy(self) -> bool:
        """Whether it took more than `BUSY` from the look before to the last one, which is this one if it has been a while."""
        now, used = time.monotonic(), time.process_time()
        if now - self._looked >= LOOK_SECONDS:
            self._was_busy = used - self._used > BUSY * (now - self._looked)
            self._looked, self._used = now, used
        return self._was_busy
