"""Timing in turns, the sizes of the cases, and the device they run on."""
import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.model_management
import torch

from featherweight.ops import kernels
from featherweight.ops.cpu import features as cpu_features
from featherweight.ops.kernels import selector, used
from featherweight.ops.layers.workspace import Workspace, shared_workspace


@dataclass(frozen=True)
class Sizes:
    """How large the cases are. Shapes are (N, K), tokens are M, blocks are (double, single) blocks
    of a Flux."""

    shapes: tuple[tuple[int, int], ...] = ((3072, 3072), (3072, 12288), (3072, 9216), (4096, 10240))
    tokens: tuple[int, ...] = (1, 16, 64, 256, 1024)
    weight: tuple[int, int] = (3072, 12288)
    hidden: int = 3072
    context: int = 4096
    lora_tokens: tuple[int, ...] = (256, 1024, 4096)
    model_tokens: int = 1280
    model_blocks: tuple[int, int] = (1, 2)
    file_blocks: tuple[int, int] = (4, 4)
    scale_blocks: tuple[int, int] = (19, 38)
    scale_tokens: int = 256
    vocabulary: int = 262_144
    unet: tuple[int, int] = (320, 64)  # channels, latent's side
    pictures: int = 8
    ranks: tuple[int, ...] = (32,)


ON_A_GPU = Sizes(tokens=(1, 16, 64, 256, 1024, 4608), model_tokens=4096)
QUICK = Sizes(shapes=((256, 512),), tokens=(1, 16, 128), weight=(256, 512), hidden=256,
              context=1024, lora_tokens=(1, 128), model_tokens=16, model_blocks=(1, 1),
              file_blocks=(1, 1), scale_blocks=(4, 4), scale_tokens=16, vocabulary=512,
              unet=(32, 8), pictures=2)


def side_by_side(variants: dict, rounds: int, clock=time.perf_counter) -> dict[str, dict]:
    """Seconds of each variant: median, least and most of `rounds` interleaved runs after one to
    warm up; and "by", where it asks for kernels: which operations ran by which backend.

    A variant's attribute `prepare`, if it has one, is called before each run and not timed.
    """
    times, asked = {name: [] for name in variants}, {}
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            if hasattr(run, "prepare"):
                run.prepare()
            wait()
            with contextlib.nullcontext() if round_number else kernels_asked_for() as found:
                started = clock()
                run()
                wait()
            if round_number:
                times[name].append(clock() - started)
            elif found:
                asked[name] = {"by": ", ".join(found)}
    return {name: {**median_and_range(t), **asked.get(name, {})} for name, t in times.items()}


def median_and_range(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


@contextlib.contextmanager
def kernels_asked_for() -> Iterator[dict[str, None]]:
    """The operations that ask for a kernel meanwhile, each with the backend that it gets: "linear
    by nvrtc"."""
    found, find = {}, kernels.find

    def watched(op: str, *case, **more):
        run = find(op, *case, **more)
        found[f"{op} by {_backend_with(run)}"] = None
        return run

    kernels.find = watched
    try:
        yield found
    finally:
        kernels.find = find


def _backend_with(run: Callable | None) -> str:
    modules = (sys.modules.get(f"{kernels.__name__}.{name}_backend")
               for name in kernels.BACKENDS.values())
    return next(
        (
            module.BACKEND.name
            for module in modules
            if module and any(kernel.run is run for kernel in module.BACKEND.kernels)
        ),
        "torch",
    )


@contextlib.contextmanager
def as_in_use() -> Iterator[Workspace]:
    """Meanwhile this process is as when a model has run for a while: it holds the buffer of its
    layers, which is given, and what is timed waits for its kernels."""
    held, as_usual = shared_workspace(), (selector.submit, selector._next_load)
    selector.submit, selector._next_load = lambda work: work(), lambda: 0
    try:
        yield held
    finally:
        selector.submit, selector._next_load = as_usual


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Meanwhile torch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait():
    """Until a GPU has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine() -> str:
    """The GPU or the CPU, its threads, torch, and the kernels that packed weights use."""
    what = f"torch {torch.__version__}, kernels: {used(device(), [], torch.float32)}"
    if torch.accelerator.is_available():
        return f"{comfy.model_management.get_torch_device_name(device())}, {what}"
    name = cpu_features.model_name() or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {what}"


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def has_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16; a CPU without it takes longer than in float32."""
    return torch.accelerator.is_available() or cpu_features.multiplies_bfloat16()
