"""python3 dev.py gpu: everything that only a GPU can show, in one command of at most nine minutes.

| file | holds |
|---|---|
| `__main__.py` | the stages in turn, each in a process of its own, and the report as it grows |
| `stages.py`, `stage.py` | the stages and how long each may take; one of them in its process |
| `device.py`, `kernels.py` | what the device is; which kernels are right and fast there |
| `breakeven.py` | LoRAs and int8: from where on one way is faster than another |
| `memory.py` | models larger than the device may hold, in dynamic VRAM and without |
| `report.py` | JSON, Markdown, a picture, and the figures to reach |
| `offline_bundle.py` | what a machine without a package index lacks, an environment made of it |

`offline_bundle.py` imports the standard library only.
"""
