"""Backends that misbehave, for tests of trials. They run plain torch on a CPU. Each dequantises
Q8_0 correctly and does to Q4_0 what its name says.

`COMMAND` starts a process that tries them. There the reference is slowed down, so that a right
kernel is faster than torch.
"""
import ctypes
import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch

PACK = Path(__file__).resolve().parents[2]
START = (
    "import sys, types; pack = types.ModuleType('featherweight'); pack.__path__ = [sys.argv[1]];"
    " sys.modules['featherweight'] = pack; sys.path.insert(0, sys.argv[2]); import"
    " planted_backends; planted_backends.main()")
COMMAND = (sys.executable, "-c", START, str(PACK), str(PACK / "tests" / "support"))
# Environment variable: a folder in which each backend writes its process id to a file of its name.
LOG = "PLANTED_BACKENDS_LOG"
DELAY = 0.002  # seconds that the reference takes longer than it needs


def loops(*_):
    """Never returns; it sleeps, since other tests need the CPU."""
    while True:
        time.sleep(DELAY)


def wrong_in_the_tail(packed_format, tensors, out, first):
    right(packed_format, tensors, out, first)
    if out.numel() % packed_format.block_length:
        out[-1] += 1


def wrong_at_odd_addresses(packed_format, tensors, out, first):
    right(packed_format, tensors, out, first)
    if tensors[0].data_ptr() % 2:
        out[0] += 1


def slow(*arguments):
    time.sleep(5 * DELAY)
    right(*arguments)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("out of memory")


def refuses(*_):
    raise RuntimeError("no such instruction")


def loses_the_device(*_):
    """Behaves as after a fault on a CUDA device: all later work on it fails in this process."""
    def lost(*arguments, **options):
        raise RuntimeError("an illegal memory access was encountered")

    torch.zeros = lost
    lost()


def garbage(*arguments):
    for standard in (1, 2):
        os.write(standard,
                 b'}{ \xff\n[1]\n{"name": "probe by garbage", "verdict": "wrong", "at": 1}\n')
    right(*arguments)


def holds_on(*_):
    """Waits in native code, and keeps all other threads of Python from running."""
    ctypes.PyDLL(None).pause()


MISBEHAVE = {
    "segfaults": lambda *_: ctypes.string_at(0),
    "leaves": lambda *_: os._exit(0),
    "is_killed": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
    "loops": loops,
    "wrong_in_the_tail": wrong_in_the_tail,
    "wrong_at_odd_addresses": wrong_at_odd_addresses,
    "slow": slow,
    "out_of_memory": out_of_memory,
    "loses_the_device": loses_the_device,
    "refuses": refuses,
    "known": refuses,
    "stopped_the_computer": loops,
    "garbage": garbage,
    "fine": lambda *arguments: right(*arguments),
    "holds_on": holds_on,
}
_references = {}
_planted = {}


def right(packed_format, tensors, out, first):
    reference = _references.get(packed_format.name, packed_format.dequantize_into)
    reference(tensors, out, first)


def backend(name: str):
    from featherweight.ops.kernels import Backend, Kernel

    def misbehave(*arguments):
        if LOG in os.environ:
            part = Path(os.environ[LOG], f"{name}.part")
            part.write_text(str(os.getpid()))
            part.rename(part.with_name(name))
        MISBEHAVE.get(name, right)(*arguments)

    def probe(device):
        if name == "no_probe":
            raise RuntimeError("no driver")
        if name == "loses_the_device_at_once":
            loses_the_device()

    runs = {"Q8_0": right, "Q4_0": misbehave}
    kernels = tuple(Kernel("dequantize", frozenset([packed]), frozenset([torch.float32]), run)
                    for packed, run in runs.items())
    return Backend(name, probe, kernels)


def plant() -> dict:
    """Registers all of them as backends of this process. Returns the formats."""
    from featherweight.ops import formats  # noqa: F401
    from featherweight.ops.formats.base import FORMATS
    from featherweight.ops.kernels.registry import IMPORTS

    for name in (*MISBEHAVE, "no_probe", "loses_the_device_at_once"):
        _planted[name] = backend(name)
        IMPORTS[name] = functools.partial(_planted.__getitem__, name)
    return FORMATS


def main():
    formats = plant()
    from featherweight.ops.kernels import trial_process

    trial_process.ROWS, trial_process.COLUMNS = 16, 256

    def slowed(reference):
        def dequantize_into(*arguments):
            time.sleep(DELAY)
            return reference(*arguments)
        return dequantize_into

    for name in ("Q4_0", "Q8_0"):
        _references[name] = formats[name].dequantize_into
        formats[name].dequantize_into = slowed(_references[name])
    trial_process.main()
