"""Cases of what loading does to a file's weights: codes that stand in tiles or words are repacked
into rows, and dense weights packed to ComfyUI's own types."""
import functools
import math
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from devtools.measure.bench.models import write_dense_flux
from devtools.measure.in_turn import time_in_turn
from devtools.measure.random_models import randn, shapes_for
from devtools.measure.timing import device, median_and_range, side_by_side
from devtools.measure.weights import LAYOUTS

import torch
from comfy_kitchen.tensor.base import QuantizedTensor
from safetensors.torch import save_file
from torch.utils.benchmark import timer
from torch.utils.benchmark.utils.common import set_torch_threads

from featherweight.loaders.files import packed_cache
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.ops import kernels
from featherweight.ops.packing.pack_types import ROW_TYPES
from featherweight.ops.quantize.second_moments import BLOCK, SecondMoments

TOKENS = 2048  # that the inputs were measured with
REPACKED_BLOCKS = 2
LOADED_BLOCKS = (2, 2)  # 1.0 billion values at 3072
RANKS = {"int4": 32, "nvfp4": 128}  # of the models that Nunchaku offers
AWQ_GROUP = 128


def bench_comfy(options):
    """Packing a bfloat16 weight to ComfyUI's own types, and megabytes of it a second: by ComfyUI's
    own conversion (comfy_kitchen, which may lack a type), by plain rounding, by search, and with
    error feedback in blocks of 256 columns; on a CPU processor time of one thread, and time on two
    threads."""
    shape, on_cpu = options.sizes.weight, device().type == "cpu"
    weight = randn(*shape, dtype=torch.bfloat16)
    moments = SecondMoments.zeros(shape[1], BLOCK, device())
    for number, part in enumerate(randn(TOKENS, shape[1]).chunk(4)):
        moments.add(part, hold_out=number == 0)
    for count in (1, 2) if on_cpu and not options.quick else (torch.get_num_threads(),):
        for name, row_type in ROW_TYPES.items():
            variants = {}
            if name in LAYOUTS:
                layout, arguments = LAYOUTS[name]
                variants["ComfyUI's"] = functools.partial(QuantizedTensor.from_float, weight,
                                                          layout, **arguments)
            pack = functools.partial(row_type.pack, weight)
            variants |= {"plain": functools.partial(pack, is_plain=True), "searched": pack,
                         "with feedback": functools.partial(pack, moments)}
            with set_torch_threads(count):
                # of one thread, which other programs do not lengthen
                clock = time.process_time if on_cpu and count == 1 else timer
                row = side_by_side(variants, options.rounds, clock)
            title = f"{name}, {count} thread{'s' * (count > 1)}" if on_cpu else name
            yield title, row
            yield f"{title}, MB/s", {variant: f"{weight.nbytes / 1e6 / times['median']:.0f}"
                                     for variant, times in row.items()}


def bench_comfy_load(options):
    """Seconds of loading a bfloat16 Flux of random weights, packed to each of ComfyUI's own types
    while it is loaded, with a compiler and without. The file is in the page cache."""
    shapes = shapes_for(options, LOADED_BLOCKS)
    off = {packed_cache.FOLDER: packed_cache.OFF}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, off):
        path = Path(folder) / "flux.safetensors"
        write_dense_flux(path, shapes)
        values = sum(math.prod(shape) for shape in shapes.values())
        for name in ROW_TYPES:
            load = functools.partial(load_diffusion_model, str(path), pack_to=name)
            row = {"compiled": side_by_side({"": load}, 1)[""]}
            with mock.patch.object(kernels, "find", return_value=None):
                row["in torch"] = median_and_range(time_in_turn({"": load}, 1)[""])
            yield f"{name}, {values / 1e9:.2f} billion values", row


def read(path: Path):
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def bench_repack(options):
    """Reading the layers of two blocks of a Flux by SVDQuant, with modulations by AWQ, and of two
    of a language model by AutoAWQ and GPTQ, all of random codes, against reading the file. It is in
    the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in _models(options.sizes.hidden):
            path = Path(folder) / f"{name}.safetensors"
            save_file({f"{layer}.{part}": tensor for layer, parts in layers
                       for part, tensor in parts.items()}, path)
            variants = {"read the file": lambda path=path: read(path),
                        "repack": lambda path=path: open_weights(path).state_dict()}
            nbytes = path.stat().st_size
            yield f"{name}, {nbytes / 1e9:.2f} GB", side_by_side(variants, options.rounds)
            path.unlink()


def _models(hidden: int):
    """Yields a model of each quantiser: its name, and (layer, parts) of its layers."""
    shapes = {"attn.to_qkv": (3 * hidden, hidden), "attn.to_out.0": (hidden, hidden),
              "ff.net.0.proj": (4 * hidden, hidden), "ff.net.2": (hidden, 4 * hidden)}
    blocks = [f"transformer_blocks.{block}" for block in range(REPACKED_BLOCKS)]
    for precision in RANKS:
        yield f"SVDQuant {precision}", [
            *((f"{block}.{layer}", _svdquant(*shape, precision))
              for block in blocks for layer, shape in shapes.items()),
            *((f"{block}.norm1.linear", _awq_tiles(6 * hidden, hidden)) for block in blocks)]
    for quantizer in ("AutoAWQ", "GPTQ"):
        yield quantizer, [(f"{block}.{layer}", _words(*shape, quantizer))
                          for block in blocks for layer, shape in shapes.items()]


def _codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    words = torch.randint(-2**31, 2**31, (math.prod(shape) * dtype.itemsize // 4,))
    return words.int().view(dtype).view(shape)


def _numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def _svdquant(rows: int, columns: int, precision: str) -> dict[str, torch.Tensor]:
    rank = RANKS[precision]
    parts = {"qweight": _codes(torch.int8, rows, columns // 2),
             "smooth_factor": _numbers(columns), "bias": _numbers(rows),
             "proj_down": _numbers(columns, rank), "proj_up": _numbers(rows, rank)}
    if precision == "int4":
        return parts | {"wscales": _numbers(columns // 64, rows)}
    scales = _numbers(columns // 16, rows, dtype=torch.float8_e4m3fn)
    return parts | {"wscales": scales, "wcscales": _numbers(rows), "wtscale": _numbers(1)}


def _awq_tiles(rows: int, columns: int) -> dict[str, torch.Tensor]:
    scales, zeros = (_numbers(columns // 64, rows) for _ in range(2))
    return {"qweight": _codes(torch.int32, rows // 4, columns // 2), "wscales": scales,
            "wzeros": zeros, "bias": _numbers(rows)}


def _words(rows: int, columns: int, quantizer: str) -> dict[str, torch.Tensor]:
    groups = columns // AWQ_GROUP
    scales = _numbers(groups, rows, dtype=torch.float16)
    if quantizer == "AutoAWQ":
        return {"qweight": _codes(torch.int32, columns, rows // 8), "scales": scales,
                "qzeros": _codes(torch.int32, groups, rows // 8)}
    zeros = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)  # 8, stored less 1
    return {"qweight": _codes(torch.int32, columns // 8, rows), "scales": scales, "qzeros": zeros,
            "g_idx": (torch.arange(columns) // AWQ_GROUP).int()}
