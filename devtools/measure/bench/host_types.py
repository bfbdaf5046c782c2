"""Cases of packing to ComfyUI's own types: a weight, compared with ComfyUI's own conversion, and a
model while it is loaded."""
import functools
import math
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from devtools.measure.bench.timing import device, side_by_side, threads

import comfy.quant_ops  # noqa: F401  registers the layouts
import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from safetensors.torch import save_file

from devtools.files.tiny_models import flux_shapes
from featherweight.loaders.files import packed_cache
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops import kernels
from featherweight.ops.quantize.row_types import ROW_TYPES, pack_to_type
from featherweight.ops.quantize.second_moments import BLOCK, SecondMoments

# the class of ComfyUI's own conversion, and how it is called
LAYOUTS = {
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}), "nvfp4": ("TensorCoreNVFP4Layout", {})}
TOKENS = 2048  # that the inputs were measured with
BLOCKS = (2, 2)  # of the Flux that is packed while it is loaded: 1.0 billion parameters at 3072


def bench_host_types(options):
    """Packing a bfloat16 weight to ComfyUI's own types, and megabytes of it a second: by ComfyUI's
    own conversion (comfy_kitchen, which may lack a type), by plain rounding, by search, and with
    error feedback in blocks of 256 columns; on a CPU processor time of one thread, and time on two
    threads."""
    shape = options.sizes.weight
    weight = torch.randn(shape, device=device()).bfloat16()
    moments = SecondMoments.zeros(shape[1], BLOCK, device())
    for number, part in enumerate(torch.randn(TOKENS, shape[1], device=device()).chunk(4)):
        moments.add(part, hold_out=number == 0)
    on_cpu = device().type == "cpu"
    for count in (1, 2) if on_cpu and not options.quick else (torch.get_num_threads(),):
        for name, row_type in ROW_TYPES.items():
            variants = {}
            if name in LAYOUTS:
                layout, arguments = LAYOUTS[name]
                variants["ComfyUI's"] = functools.partial(QuantizedTensor.from_float, weight,
                                                          layout, **arguments)
            pack = functools.partial(pack_to_type, weight, row_type)
            variants |= {"plain": functools.partial(pack, is_plain=True), "searched": pack,
                         "with feedback": functools.partial(pack, moments)}
            with threads(count):
                # of one thread, which other programs do not lengthen
                clock = time.process_time if on_cpu and count == 1 else time.perf_counter
                row = side_by_side(variants, options.rounds, clock)
            title = f"{name}, {count} thread{'s' * (count > 1)}" if on_cpu else name
            yield title, row
            yield f"{title}, MB/s", {variant: f"{weight.nbytes / 1e6 / times['median']:.0f}"
                                     for variant, times in row.items()}


def bench_packing_while_loading(options):
    """Seconds of loading a bfloat16 Flux of random weights, packed to each of ComfyUI's own types
    while it is loaded, with a compiler and without. The file is in the page cache."""
    blocks = options.blocks or BLOCKS
    shapes = flux_shapes(options.sizes.hidden, *blocks, options.sizes.context)
    off = {packed_cache.FOLDER: packed_cache.OFF}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, off):
        path = Path(folder) / "flux.safetensors"
        save_file({name: torch.randn(shape, dtype=torch.bfloat16) / math.sqrt(shape[-1])
                   for name, shape in shapes.items()}, path)
        values = sum(math.prod(shape) for shape in shapes.values())
        for name in ROW_TYPES:
            row = {"compiled seconds": min(seconds(path, name) for _ in range(2))}
            with mock.patch.object(kernels, "find", return_value=None):
                row["in torch seconds"] = seconds(path, name)
            yield f"{name}, {values / 1e9:.2f} billion values", row


def seconds(path: Path, type_name: str) -> float:
    started = time.perf_counter()
    load_diffusion_model(str(path), pack_to=type_name)
    return time.perf_counter() - started
