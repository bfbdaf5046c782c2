"""Fake GPUs: any program sees N devices of M GiB that are memory of the host. Needs a C++ compiler.

    python -m devtools.fakegpu 2x4 [--late] python main.py ...

Real are: how much fits (torch.OutOfMemoryError), where each tensor lies, what is copied and what is
pinned, copies that come late where nobody waits for them, and comfy-aimdo, whose own library runs
on this driver. Counted are: used bytes, their peak, copies, pins. Not real are: kernels (the CPU
computes, to the same bits), speed, torch's caching allocator, graphs.

| path | holds |
|---|---|
| `source/` | libcuda.so.1 (devices.cpp, driver.cpp) and torch's side (streams.cpp, torch_*.cpp) |
| `build.py` | compiles them on first use |
| `child/` | goes on PYTHONPATH: its sitecustomize.py loads them in every Python started so |

In such a process `import fakegpu` reads the counters.
"""
import os
from pathlib import Path

from .build import NoFakeGpus, libraries, why_not

__all__ = ["NoFakeGpus", "environment", "libraries", "why_not"]


def environment(devices: int = 1, gib: float = 4, late: bool = False) -> dict[str, str]:
    """Environment variables of a process that is to see fake GPUs. Builds them first. Raises
    NoFakeGpus.

    gib: of memory, each. late: copies that need not block arrive only when somebody waits for them.
    """
    child = str(Path(__file__).with_name("child"))
    path = os.pathsep.join(filter(None, [child, os.environ.get("PYTHONPATH")]))
    return {
        "FAKEGPU": f"{devices}x{gib}", "FAKEGPU_LATE": str(int(late)),
        "FAKEGPU_LIBRARIES": str(libraries()), "PYTHONPATH": path,
        # with AMX, oneDNN reads behind the rows of a strided input, where a GPU's memory is NaN
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"
    }
