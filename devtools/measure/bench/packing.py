"""Cases on packing: a weight into the bytes of each type."""
import contextlib
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from devtools.measure.bench.timing import device, side_by_side, threads, wait

import gguf
import torch

from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.quantize.pack_tensor import pack_tensor
from featherweight.ops.quantize.second_moments import SecondMoments

TYPES = (
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "IQ4_XS",
    "IQ4_NL",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
    "NF4",
    "FP4",
)
IN_TORCH = 1 << 22  # values that torch packs of a larger weight, since it takes longer


def bench_pack(options):
    """Seconds for 100 M bfloat16 weights and one thread: by a kernel where there is a compiler, in
    torch, and by the gguf package where it packs the type; and by error feedback in blocks of 256
    columns, with the guard. Q8_0 also from values in memory to a file."""
    weight = torch.randn(options.sizes.weight,
                         generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16().to(
                             device())
    part = weight.view(-1)[:IN_TORCH - IN_TORCH % weight.shape[1]].view(-1, weight.shape[1])
    moments = SecondMoments.zeros(part.shape[1], 256, part.device)
    inputs = torch.randn(1024, part.shape[1], generator=torch.Generator().manual_seed(1)).to(part)
    for tokens, hold_out in zip(inputs.split(512), (False, True)):
        moments.add(tokens, hold_out=hold_out)
    with threads(1):
        for name in TYPES[::5] if options.quick else TYPES:
            packed_format, row = FORMATS[name], {}
            if kernels.find("pack_blocks", weight.device, packed_format, torch.float32) is not None:
                row["kernel seconds"] = seconds(lambda: pack_tensor(weight, packed_format),
                                                weight, options.rounds)
            with mock.patch.object(kernels, "find", return_value=None):
                row["torch seconds"] = seconds(lambda: pack_tensor(part, packed_format),
                                               part, options.rounds)
            row["feedback seconds"] = seconds(
                lambda: pack_tensor(part, packed_format, moments=moments), part, 1)
            with contextlib.suppress(KeyError, NotImplementedError):
                ggml_type, values = gguf.GGMLQuantizationType[name], part.float().cpu().numpy()
                gguf.quants.quantize(values[:1], ggml_type)
                row["gguf package seconds"] = seconds(
                    lambda: gguf.quants.quantize(values, ggml_type), part, options.rounds)
            yield name, row
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weight"
            row = {
                f"{way} seconds": seconds(lambda: write(path, weight, name), weight, options.rounds)
                for way, name in (("to a file", "Q8_0"), ("as bfloat16", "BF16"))
            }
        yield "Q8_0, packed and written", row


def write(path: Path, weight: torch.Tensor, name: str):
    with open(path, "wb") as file:
        file.write(pack_tensor(weight, FORMATS[name])._qdata.cpu().numpy().data)
        os.fsync(file.fileno())


def seconds(run, weight: torch.Tensor, rounds: int) -> float:
    """The median of some runs, for 100 M weights. Of processor time on a CPU, which other programs
    do not lengthen."""
    clock = time.process_time if weight.device.type == "cpu" else time.perf_counter
    found = side_by_side({"": run}, min(rounds, 3), clock)[""]["median"]
    wait()
    return found / weight.numel() * 1e8
