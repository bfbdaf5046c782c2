"""Backends that misbehave, for tests of what checks them. They run plain torch on a CPU. `COMMAND`
starts a process that checks them."""
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


def loops(*_):
    """Never returns; it sleeps, since other tests need the CPU."""
    while True:
        time.sleep(1)


def wrong_in_the_tail(packed_format, tensors, out, first):
    right(packed_format, tensors, out, first)
    if out.numel() % packed_format.block_length:
        out[-1] += 1


def wrong_at_odd_addresses(packed_format, tensors, out, first):
    right(packed_format, tensors, out, first)
    if tensors[0].data_ptr() % 2:
        out[0] += 1


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
                 b'}{ \xff\n[1]\n{"name": "x", "verdict": "wrong", "at": 1}\n{"ended": 0}\n')
    right(*arguments)


def holds_on(*_):
    """Waits in native code, and keeps all other threads of Python from running."""
    ctypes.PyDLL(None).pause()


# backend -> format -> what its kernel does
KERNELS = {
    "planted": {
        "Q8_0": lambda *arguments: right(*arguments), "Q4_0": lambda *_: ctypes.string_at(0),
        "Q4_1": lambda *_: os._exit(0), "Q5_0": loses_the_device, "Q5_1": out_of_memory,
        "Q2_K": wrong_in_the_tail, "Q3_K": wrong_at_odd_addresses, "Q5_K": refuses,
        "Q6_K": garbage, "NF4": lambda *_: os.kill(os.getpid(), signal.SIGKILL)},
    "loops": {"Q4_0": loops, "Q8_0": lambda *arguments: right(*arguments)},
    "holds_on": {"Q4_0": holds_on, "Q8_0": lambda *arguments: right(*arguments)},
    "no_probe": {"Q4_0": lambda *arguments: right(*arguments)},
    "fine": {name: lambda *arguments: right(*arguments) for name in ("Q4_0", "Q8_0")},
}


def right(packed_format, tensors, out, first):
    packed_format.dequantize_into(tensors, out, first)


def multiply(packed_format, tensors, input, addend, out):
    weight = input.new_empty(out.shape[1], input.shape[1])
    packed_format.dequantize_into(tensors, weight)
    out.copy_(input.double() @ weight.double().t() + (0 if addend is None else addend))


def backend(name: str):
    from featherweight.ops.kernels import Backend, Kernel

    def run_of(behave):
        def run(*arguments):
            if LOG in os.environ:
                part = Path(os.environ[LOG], f"{name}.part")
                part.write_text(str(os.getpid()))
                part.rename(part.with_name(name))
            behave(*arguments)
        return run

    def probe(device):
        if name == "no_probe":
            raise RuntimeError("no driver")

    float32 = frozenset([torch.float32])
    kernels = [Kernel("dequantize", frozenset([packed]), float32, run_of(behave))
               for packed, behave in KERNELS[name].items()]
    if name == "fine":
        kernels.append(Kernel("linear", frozenset(["Q4_0"]), float32, multiply, max_tokens=4))
    return Backend(name, probe, tuple(kernels))


def plant():
    """Registers all of them as backends of this process."""
    from featherweight.ops import formats  # noqa: F401
    from featherweight.ops.kernels.registry import IMPORTS

    for name in KERNELS:
        IMPORTS[name] = functools.partial(lambda planted: planted, backend(name))


def main():
    plant()
    from featherweight.ops.kernels import checking_process

    checking_process.main()
