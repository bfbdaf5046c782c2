"""What a card should say first, in three minutes: are kernels right, which share of its bandwidth
do they have, what does a product take beside a dense one, what do LoRAs add, do CUDA graphs and
other streams work.

It needs torch and comfy_kitchen, no ComfyUI and no process for checks: what is wrong is seen here.
"""
import contextlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import linear

from devtools import ROOT

if "featherweight" not in sys.modules:  # without its `__init__`, which imports ComfyUI
    pack = types.ModuleType("featherweight")
    pack.__path__ = [str(ROOT)]
    sys.modules["featherweight"] = pack

from featherweight.ops import kernels
from featherweight.ops.formats.base import (
    FORMATS,
    Format,
    dequantize_by_reference,
)
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels import cuda_backend, validation
from featherweight.ops.kernels.int8_codes import encode_rows
from featherweight.ops.layers import fast_by_kitchen, joint_product, product
from featherweight.ops.low_rank import LowRank, Slice

DTYPE = torch.bfloat16
NAMES = ("Q8_0", "Q4_K", "NF4", "INT8_CONVROT", "NVFP4_ROWS")
IN_PRODUCTS = NAMES[:3]
# (rows, columns) of Flux's weights
SHAPES = ((3072, 12288), (21504, 3072), (3072, 15360))
TOKENS = (1, 4, 16, 17, 64, 256, 1024, 4608)
MANY_TOKENS = 1024  # from which LoRAs and fast are measured
RANK = 32  # of two LoRAs
COPIES = 3  # of a weight, so that no cache holds it
SECONDS = 0.03  # that a measurement takes
Row = tuple[str, dict]


def rows(options) -> Iterator[Row]:
    """Yields a row for each measurement; one that fails is a row that says so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0)
    scale = 24 if options.quick else 1
    names = NAMES[:1] if options.quick else NAMES
    steps: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("the device", partial(_device, device, scale)),
        *((name, partial(_dequantize, name, device, scale)) for name in names),
        *((f"{rows} x {columns}", partial(_products, rows, columns, device, scale, options.quick))
          for rows, columns in SHAPES),
        ("graphs and streams", partial(_graphs, device))]
    with _kernels(device, untried=False):
        for title, step in steps:
            try:
                yield from step()
            except Exception as error:
                yield title, {"failed": f"{type(error).__name__}: {error}"[:400]}


@contextlib.contextmanager
def _kernels(device: torch.device, untried: bool) -> Iterator[None]:
    """Has the pack use kernels without checking them first."""
    table = [kernel for kernel in cuda_backend.BACKEND.kernels
             if device.type == "cuda" and (untried or not kernel.is_untried)]

    def look_up(capability: str, where: torch.device, packed_format: Format | None,
                dtype: torch.dtype) -> tuple:
        found = tuple(kernel for kernel in table if kernel.capability == capability
                      and kernel.accepts(packed_format, dtype))
        return kernels._found.setdefault((capability, where, packed_format, dtype), found)

    with mock.patch.object(kernels, "_look_up", look_up), mock.patch.object(kernels, "_found", {}):
        yield


def _seconds(device: torch.device, calls: list[Callable[[], Any]]) -> float:
    """Returns the least time of a call, of three measurements; the calls take turns."""
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        calls[0]()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    count = max(3, min(40, int(SECONDS / max(time.perf_counter() - started, 1e-5))))
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(8_000_000)  # until all calls are queued
        start.record()
        for index in range(count):
            calls[index % len(calls)]()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / count)
    return best


def _smaller(size: int, scale: int) -> int:
    return max(256, size // scale // 256 * 256)


def _weights(name: str, rows: int, columns: int, device: torch.device,
             copies: int = 1) -> tuple[Format, list[list[torch.Tensor]]]:
    packed_format = FAMILIES[name].of_columns(columns) if name in FAMILIES else FORMATS[name]
    tensors = validation.random_tensors(packed_format, rows * columns // packed_format.block_length,
                                        torch.device("cpu"), bounded=True)
    return packed_format, [[tensor.to(device) for tensor in tensors] for _ in range(copies)]


def _device(device: torch.device, scale: int) -> Iterator[Row]:
    found: dict[str, Any] = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "SMs": str(properties.multi_processor_count),
                  "L2": properties.L2_cache_size,
                  "compiler": str(cuda_backend._kernels()._compiler.version)}
    source, target = (torch.empty((1 << 29) // scale ** 2, dtype=torch.uint8, device=device)
                      for _ in range(2))
    found["GB/s of a copy"] = 2e-9 * source.nbytes / _seconds(device,
                                                              [lambda: target.copy_(source)])
    yield "the device", found


def _dequantize(name: str, device: torch.device, scale: int) -> Iterator[Row]:
    rows, columns = (_smaller(size, scale) for size in SHAPES[0])
    packed_format, (tensors,) = _weights(name, rows, columns, device)
    out = torch.empty(rows, columns, dtype=DTYPE, device=device)
    started = time.perf_counter()
    kernels.dequantize_into(packed_format, tensors, out)
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    expected = dequantize_by_reference(packed_format, tensors, torch.empty_like(out), 0)
    wide = torch.full((rows, columns + 64), 7.0, dtype=DTYPE, device=device)[:, :columns]
    kernels.dequantize_into(packed_format, tensors, wide)
    seconds = _seconds(device, [lambda: kernels.dequantize_into(packed_format, tensors, out)])
    by_torch = _seconds(device, [lambda: dequantize_by_reference(packed_format, tensors, out, 0)])
    nbytes = out.nbytes + sum(tensor.nbytes for tensor in tensors)
    yield name, {"same bits": torch.equal(out, expected), "with a pitch": torch.equal(wide, out),
                 "first, seconds": first, "GB/s": 1e-9 * nbytes / seconds,
                 "of torch's time": seconds / by_torch}
    with _kernels(device, untried=True):
        encode = kernels.find("int8_rows", device, packed_format, torch.int8)
    if encode is not None:
        (codes, scales), (expected, of_torch) = (
            (torch.empty(out.shape, dtype=torch.int8, device=device),
             torch.empty(rows, dtype=torch.float32, device=device)) for _ in range(2))
        encode(packed_format, tensors, codes, scales, 0)
        encode_rows(packed_format, tensors, expected, of_torch, 0)
        yield f"int8 codes of {name}", {
            "largest difference": (codes.int() - expected).abs().max().item(),
            "of the scales": ((scales - of_torch) / of_torch).abs().max().item()}


def _products(rows: int, columns: int, device: torch.device, scale: int,
              quick: bool) -> Iterator[Row]:
    """Yields times as shares of a dense product's."""
    rows, columns = _smaller(rows, scale), _smaller(columns, scale)
    copies = 1 if quick else COPIES
    dense = [torch.randn(rows, columns, device=device).to(DTYPE) for _ in range(copies)]
    bias = torch.randn(rows, device=device).to(DTYPE)
    packed = {name: _weights(name, rows, columns, device, copies) for name in IN_PRODUCTS}
    loras = LowRank(torch.randn(RANK, columns, device=device).to(DTYPE),
                    (torch.randn(rows, RANK, device=device).to(DTYPE),),
                    (Slice(0, rows, 0, RANK),))
    ways = {"": (None, None, False), "+2 joint": (loras, True, False),
            "+2 apart": (loras, False, False), "fast": (None, None, True),
            "fast +2": (loras, None, True), "fast, codes at once": (None, None, True)}
    for tokens in TOKENS[::4] if quick else TOKENS:
        input = torch.randn(tokens, columns, device=device).to(DTYPE)
        base = _seconds(device, [partial(linear, input, weight, bias) for weight in dense])
        found = {"dense, us": 1e6 * base}
        for name, (packed_format, copies_of) in packed.items():
            for way, (branch, joint, fast) in ways.items():
                if (way and tokens < MANY_TOKENS) or (fast and not fast_by_kitchen._backend(
                        "int8", device, DTYPE)):
                    continue
                operands = (None, [], []) if branch is None else branch.operands
                chosen = joint_product.is_smaller
                if joint is not None:
                    joint_product.is_smaller = lambda *_, joint=joint: joint
                try:
                    with _kernels(device, untried="at once" in way):
                        found[f"{name} {way}".strip()] = _seconds(device, [
                            partial(product._linear, input, tensors, bias, packed_format.name, rows,
                                    *operands, fast) for tensors in copies_of]) / base
                finally:
                    joint_product.is_smaller = chosen
        yield f"{rows} x {columns}, M = {tokens}", found


def _graphs(device: torch.device) -> Iterator[Row]:
    packed_format, (tensors,) = _weights("Q4_K", 256, 256, device)
    one = torch.randn(1, 256, device=device).to(DTYPE)
    many = one.expand(64, -1).contiguous()

    def multiply(input: torch.Tensor) -> torch.Tensor:
        return product._linear(input, tensors, None, packed_format.name, 256, None, [], [])

    expected = multiply(one), multiply(many)
    started = time.perf_counter()
    for _ in range(100):
        multiply(one)
    found: dict[str, Any] = {"Python, us": 1e4 * (time.perf_counter() - started)}
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = multiply(one)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = multiply(one), multiply(many)
        graph.replay()
        torch.cuda.synchronize()
        found |= {"on another stream": torch.equal(aside, expected[0]),
                  "in a graph": all(map(torch.equal, outs, expected)),
                  "most memory": torch.cuda.max_memory_allocated()}
    yield "graphs and streams", found
