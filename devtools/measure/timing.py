"""Timing in turns, the sizes of the cases, and the device they run on."""
import contextlib
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devtools.measure.in_turn import time_in_turn

import comfy.model_management
import torch
from torch.utils.benchmark import timer

from featherweight.loaders.devices import total_memory
from featherweight.ops import cpu_features, kernels
from featherweight.ops.formats.base import FORMATS as PACKED
from featherweight.ops.kernels import used
from featherweight.ops.layers.workspace import Workspace, shared_workspace

LEAST_QUEUED, MOST_QUEUED, ROUND_SECONDS = 3, 20, 0.02
CYCLES_AHEAD = 20_000_000  # about 10 ms of a GPU's clock
FORMATS = ("Q8_0", "Q4_K", "NF4")  # that cases measure, unless told otherwise


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
    step_tokens: int = 256
    model_tokens: int = 1280
    model_blocks: tuple[int, int] = (1, 2)
    unet: tuple[int, int] = (320, 64)  # channels, latent's side


ON_A_GPU = Sizes(tokens=(1, 16, 64, 256, 1024, 4608), step_tokens=4096, model_tokens=4096)
QUICK = Sizes(shapes=((256, 512),), tokens=(1, 16, 128), weight=(256, 512), hidden=256,
              context=1024, lora_tokens=(1, 128), step_tokens=16, model_tokens=16,
              model_blocks=(1, 1), unet=(32, 8))


def side_by_side(variants: Mapping[str, Callable], rounds: int,
                 clock: Callable[[], float] = timer) -> dict[str, dict]:
    """Times variants in turn, after one run of each to warm up.

    torch's own Timer runs one variant after the other, and never without a warm-up.

    Args:
        variants: as of `time_in_turn`.
        rounds: of all of them.
        clock: that of torch's benchmarks waits for a GPU.

    Returns:
        `median_and_range` of each; and "by", where it asks for kernels: which operations ran by
        which backend.
    """
    asked = {}
    for name, run in variants.items():
        with kernels_asked_for() as found:
            time_in_turn({name: run}, 1, clock)
        asked[name] = {"by": ", ".join(found)} if found else {}
    times = time_in_turn(variants, rounds, clock)
    return {name: {**median_and_range(taken), **asked[name]} for name, taken in times.items()}


def median_and_range(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def queued(variants: Mapping[str, Sequence[Callable]], rounds: int) -> dict[str, dict]:
    """Times calls that a GPU makes one right after another; on a CPU as `side_by_side`.

    Calls of `ROUND_SECONDS` wait behind other work until all are queued, and the GPU itself takes
    their time: Python's is not counted.

    Args:
        variants: name -> calls made in turn, each of other weights: with `copies` of them none is
            left in the GPU's cache.
        rounds: of all variants.

    Returns:
        As `side_by_side`, of one call.
    """
    once = {name: calls[0] for name, calls in variants.items()}
    if device().type != "cuda":
        return side_by_side(once, rounds)
    asked = side_by_side(once, 1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, calls in variants.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            count = max(LEAST_QUEUED, min(MOST_QUEUED, int(ROUND_SECONDS / asked[name]["median"])))
            torch.cuda._sleep(CYCLES_AHEAD)
            begin.record()
            for number in range(count):
                calls[number % len(calls)]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / count)
    return {name: {**asked[name], **median_and_range(taken)} for name, taken in times.items()}


def copies(nbytes: int) -> int:
    """Returns how many weights of some bytes are more than a GPU's cache holds, 1 on a CPU."""
    if device().type != "cuda":
        return 1
    return 1 + 2 * torch.cuda.get_device_properties(device()).L2_cache_size // nbytes


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
    return next((module.BACKEND.name for module in modules
                 if module and any(kernel.run is run for kernel in module.BACKEND.kernels)),
                "torch")


def decided_first(look_up: Callable) -> Callable:
    """Returns `kernels._look_up` for calls outside of models: a case is decided when it is first
    needed."""
    def decide_and_look_up(capability, where, packed_format, dtype):
        kernels.decide(where, [(capability, packed_format, dtype)])
        return look_up(capability, where, packed_format, dtype)

    return decide_and_look_up


@contextlib.contextmanager
def as_in_use() -> Iterator[Workspace]:
    """Meanwhile this process is as when a model has run for a while: it holds the buffer of its
    layers, which is given, and what is timed decides its kernels first."""
    held, look_up = shared_workspace(), kernels._look_up
    kernels._look_up = decided_first(look_up)
    try:
        yield held
    finally:
        kernels._look_up = look_up


def machine() -> str:
    """The GPU or the CPU, its threads, torch, and the kernels that packed weights use."""
    facts = device_facts(device())
    kernels.decide(device(), [("dequantize", PACKED["Q8_0"], torch.float32)])
    threads = f", {facts['threads']} threads" if facts["threads"] else ""
    return (f"{facts['name']}, {facts['memory GB']:g} GB{threads}, torch {torch.__version__},"
            f" kernels: {used(device(), [], torch.float32)}")


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def has_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16; a CPU without it takes longer than in float32."""
    return torch.accelerator.is_available() or cpu_features.multiplies_bfloat16()


def fast_dtype() -> torch.dtype:
    return torch.bfloat16 if has_bfloat16() else torch.float32


def float_dtypes() -> list[torch.dtype]:
    return list(dict.fromkeys([fast_dtype(), torch.float32]))


def cpu_name() -> str:
    """Returns what Linux calls the CPU; "" on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    match = re.search(r"model name\s*: (.+)", text)
    return match[1] if match else ""


def device_facts(device: torch.device) -> dict:
    """Returns the name and the sizes of a device."""
    name, capability = cpu_name() or platform.machine(), None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {"type": device.type, "name": name, "capability": capability,
            "memory GB": round(total_memory(device) / 1e9, 1),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "CUDA": torch.version.cuda, "HIP": torch.version.hip}
