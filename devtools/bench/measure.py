"""Timing in turns, the sizes of the cases, random packed weights."""
import importlib.util
import math
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import gguf
import numpy as np
import torch
from featherweight.ops.format import FORMATS
from featherweight.ops.formats.bnb_4bit import Codebook4Bit
from featherweight.ops.kernels import backend_of
from featherweight.ops.tensor import QuantizedTensor, packed_tensor

from devtools.gguf_files import block_pool

FORMAT_NAMES = [name for name, packed_format in FORMATS.items()
                if packed_format.ggml_type is not None or issubclass(packed_format, Codebook4Bit)]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are. Shapes are (N, K), tokens are M, blocks are (double, single) blocks of a Flux."""

    shapes: tuple[tuple[int, int], ...] = ((3072, 3072), (3072, 12288), (3072, 9216), (4096, 10240))
    tokens: tuple[int, ...] = (1, 16, 64, 256, 1024)
    weight: tuple[int, int] = (3072, 12288)
    hidden: int = 3072
    context: int = 4096
    lora_tokens: tuple[int, ...] = (256, 1024, 4096)
    model_tokens: int = 1024
    model_blocks: tuple[int, int] = (1, 2)
    file_blocks: tuple[int, int] = (4, 4)
    scale_blocks: tuple[int, int] = (19, 38)
    scale_tokens: int = 256
    vocabulary: int = 262_144


ON_A_GPU = Sizes(tokens=(1, 16, 64, 256, 1024, 4608), model_tokens=4096)
QUICK = Sizes(shapes=((256, 512),), tokens=(1, 16, 128), weight=(256, 512), hidden=256, context=1024,
              lora_tokens=(1, 128), model_tokens=16, model_blocks=(1, 1), file_blocks=(1, 1), scale_blocks=(4, 4),
              scale_tokens=16, vocabulary=512)


def side_by_side(variants: dict, rounds: int, clock=time.perf_counter) -> dict[str, dict]:
    """Seconds of each variant: median, least and most of `rounds` interleaved runs after one to warm up.

    A variant's attribute `prepare`, if it has one, is called before each run and not timed.
    """
    times = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, run in variants.items():
            if hasattr(run, "prepare"):
                run.prepare()
            wait()
            started = clock()
            run()
            wait()
            if round_number:
                times[name].append(clock() - started)
    return {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in times.items()}


def wait():
    """Until a GPU has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def machine() -> str:
    """The GPU or the CPU, its threads, torch, and the kernels that packed weights use."""
    kernels = f"torch {torch.__version__}, kernels: {backend_of(device())}"
    if torch.accelerator.is_available():
        return f"{comfy.model_management.get_torch_device_name(device())}, {kernels}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {kernels}"


def device() -> torch.device:
    return comfy.model_management.get_torch_device()


def has_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16; a CPU without it takes longer than in float32."""
    return torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def random_weight(format_name: str, shape: tuple[int, int]) -> QuantizedTensor:
    """A packed weight of random valid blocks."""
    packed_format, generator, values = FORMATS[format_name], np.random.default_rng(0), math.prod(shape)
    scale = None
    if packed_format.ggml_type is None:
        data = torch.from_numpy(generator.integers(0, 256, values // 2, dtype=np.uint8))
        blocks = -(-values // packed_format.block_length)
        scale = torch.from_numpy(generator.uniform(0.01, 0.1, blocks).astype(np.float32))
    else:
        pool = block_pool(format_name)
        picks = generator.integers(0, len(pool), values // packed_format.block_length)
        data = torch.from_numpy(pool[picks]).view(packed_format.packed_shape(shape))
    return packed_tensor(packed_format, data, shape, torch.float32, scale)


def packed_weight(format_name: str, values: torch.Tensor) -> QuantizedTensor | None:
    """A weight of these values, float32 (N, K); None where there is nothing here that packs the format."""
    packed_format = FORMATS[format_name]
    if packed_format.ggml_type is not None:
        try:
            data = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[format_name])
        except NotImplementedError:
            return None
        return packed_tensor(packed_format, torch.from_numpy(data), values.shape)
    if not importlib.util.find_spec("bitsandbytes"):
        return None
    from bitsandbytes import functional

    data, state = functional.quantize_4bit(values, blocksize=packed_format.block_length, quant_type=format_name.lower())
    return packed_tensor(packed_format, data.flatten(), values.shape, torch.float32, state.absmax)


def snr(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to noise in dB; 20 dB are an error of a tenth."""
    exact = exact.double()
    return (20 * torch.log10(exact.norm() / (found.double() - exact).norm())).item()
