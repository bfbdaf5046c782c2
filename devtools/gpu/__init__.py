"""python3 dev.py gpu: everything that only a GPU can show, in one command of at most nine minutes.

    __main__.py the stages in turn, each in a process of its own; what each gives is in the report
    as it comes stages.py the stages and how long each may take; stage.py: one of them in its
    process device.py what the device is; kernels.py: which kernels are right and fast there
    crossing.py LoRAs and int8, where one way overtakes another memory.py models larger than the
    device may hold, in dynamic VRAM and without report.py JSON, Markdown, a picture, and the
    figures to reach bare.py what a machine without a package index lacks, and an environment made
    of it (standard library only)
"""
