"""Runs the host's main.py and ends when the process that asked for it is gone: python run_host.py
PID MAIN [arguments]

A server must not outlive a killed test run, whatever killed it, so the child watches the parent.
"""
import gc
import os
import runpy
import sys
import threading
import time
from pathlib import Path

import psutil


def _end_with(process: psutil.Process):
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    except psutil.NoSuchProcess:
        pass
    os._exit(1)


if __name__ == "__main__":
    owner, main = int(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with, args=(psutil.Process(owner),), daemon=True).start()
    sys.argv = [str(main), *sys.argv[3:]]
    sys.path[0] = str(main.parent)
    os.chdir(main.parent)
    # A tenth of the start goes into collections that find nothing. ComfyUI collects after prompts.
    gc.set_threshold(50_000)
    runpy.run_path(str(main), run_name="__main__")
