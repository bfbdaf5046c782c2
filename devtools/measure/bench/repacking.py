"""Cases on files whose codes stand in tiles or words, which loading repacks into rows."""
import math
import tempfile
from pathlib import Path

from devtools.measure.bench.files import read
from devtools.measure.bench.timing import side_by_side

import torch
from safetensors.torch import save_file

from featherweight.loaders.files.open_weights import open_weights

BLOCKS = 2
RANKS = {"int4": 32, "nvfp4": 128}  # of the models that Nunchaku offers
AWQ_GROUP = 128


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
    blocks = [f"transformer_blocks.{block}" for block in range(BLOCKS)]
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
