"""python3 dev.py gpu: everything that only a GPU can show, in two commands of nine minutes at most.

| file | holds |
|---|---|
| `__main__.py` | the stages in turn, each in a process of its own, and the report as it grows |
| `stages.py` | the stages and how long each may take; one of them in its process |
| `kernels.py` | which kernels are right and fast on the device |
| `memory.py` | models larger than the device may hold, in dynamic VRAM and without |
| `goals.py` | the figures to reach |
| `offline_bundle.py` | what a machine without a package index lacks, an environment made of it |

The other stages are cases of the bench. `offline_bundle.py` imports the standard library only.
"""
