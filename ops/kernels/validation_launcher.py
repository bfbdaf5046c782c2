"""Starts the process that validates kernels, once for each line of its input: a workflow starts no
program.

It runs from ComfyUI's start to its end, without torch, and holds neither a context on a GPU nor
more than a bare Python's memory while nothing is to be validated. A line is a job of
`validation_process`, whose results go to the standard output; after them a line {"ended": exit
status}.
"""
import json
import os
import subprocess
import sys
import threading

from ...child_process import end_all, end_process, start_process


def _run(job: bytes, command: list[str], seconds: float) -> int:
    process = start_process(*command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    stdin = process.stdin
    assert stdin is not None  # it is a pipe
    try:
        stdin.write(job)
        stdin.flush()
        process.wait(seconds)
    except (OSError, subprocess.TimeoutExpired):  # it may have ended already
        pass
    finally:
        end_process(process)
    return process.returncode


def _run_all(jobs, command: list[str]):
    for job in jobs:
        status = _run(job, command, json.loads(job)["seconds"])
        print(json.dumps({"ended": status}), flush=True)


def main():
    """Runs the jobs on the standard input, with the command in the arguments. Does not return."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as jobs:
        threading.Thread(target=_run_all, args=(jobs, sys.argv[2:]), daemon=True).start()
        while line := sys.stdin.buffer.readline():
            os.write(writer, line)
        end_all()  # whoever started this has ended
        os._exit(0)
