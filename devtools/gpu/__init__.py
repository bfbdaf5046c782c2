"""python3 dev.py gpu: everything that only a GPU can show, in two commands of nine minutes at most.

| file | holds |
|---|---|
| `__main__.py` | the stages in turn and the report as it grows |
| `stages.py` | the stages and how long each may take; a process that runs some of them |
| `first.py` | the first stage, without ComfyUI: bits, bandwidth, products, LoRAs, graphs |
| `kernels.py` | which kernels are right and fast on the device |
| `memory.py` | models larger than the device may hold, in dynamic VRAM and without |
| `goals.py` | the figures to reach |
| `offline_bundle.py` | what a machine without a package index lacks, an environment made of it |

The other stages are cases of the bench. `offline_bundle.py` imports the standard library only.
"""
