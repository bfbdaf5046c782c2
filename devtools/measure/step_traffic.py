"""Counts the kernels that the linear layers of a step of Flux.1 start on a GPU, and the bytes that
these read and write.

The pack's own products run on meta tensors. In place of this pack's kernels and of comfy_kitchen's
stand functions that count what one of them moves; torch's operators count their operands and
results, each once.
"""
import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from featherweight.ops import kernels
from featherweight.ops.formats.base import FORMATS, Format
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels.cuda_backend import BACKEND
from featherweight.ops.layers import fast_by_kitchen, int8_epilogue, joint_product, product
from featherweight.ops.layers.rounded_sum import add_branch
from featherweight.ops.low_rank import LowRank, Slice

GPU, META = torch.device("cuda", 0), torch.device("meta")
DTYPE = torch.bfloat16
RANK = 16  # of a LoRA
PICTURE, TEXT = 4096, 512  # tokens
WIDTH = 3072
# Linear layers of Flux.1, of 1024 x 1024 pixels: (how many, rows of the input, N, K)
DOUBLE_BLOCK = [(2, 1, 6, 1), *((1, tokens, *shape) for tokens in (PICTURE, TEXT)
                                for shape in ((3, 1), (1, 1), (4, 1), (1, 4)))]
SINGLE_BLOCK = [(1, 1, 3, 1), (1, PICTURE + TEXT, 7, 1), (1, PICTURE + TEXT, 1, 5)]
LAYERS = [(blocks * count, tokens, n * WIDTH, k * WIDTH)
          for blocks, block in ((19, DOUBLE_BLOCK), (38, SINGLE_BLOCK))
          for count, tokens, n, k in block]
# what comfy_kitchen's kernels of ComfyUI's own layers read: (bytes of 256 codes and their scales)
HOST_BYTES = {"int8_tensorwise": 256, "nvfp4": 144}


class Traffic(TorchDispatchMode):
    """Counts kernels that start on a GPU, and the bytes that they read and write.

    Attributes:
        launches: kernels.
        nbytes: bytes.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.name()
        if not (func.is_view or "empty" in name or "detach" in name or name.startswith("prim::")):
            read = [arg for arg in args if isinstance(arg, torch.Tensor)]
            if name.startswith(("aten::copy_", "aten::zero_", "aten::fill_")):
                read = read[1:]
            elif name.startswith("aten::cat"):
                read = list(args[0])
            self.add(kwargs.get("out", out), *read)
        return out

    def add(self, *operands: torch.Tensor | int):
        """Counts a kernel, by the tensors or bytes that it reads and writes."""
        self.launches += 1
        self.nbytes += sum(operand if isinstance(operand, int)
                           else operand.numel() * operand.itemsize for operand in operands)


def count_step(format_name: str, fast: bool = False, loras: int = 0, untried: bool = False,
               epilogue: bool = False) -> Traffic:
    """Counts a step.

    Args:
        format_name: of the weights, a key of `FORMATS` or `FAMILIES`; "dense"; or one of
            `HOST_BYTES`, which ComfyUI multiplies.
        fast: how the layers compute.
        loras: their number, of rank `RANK`, on all layers.
        untried: with kernels that no GPU has run.
        epilogue: where comfy_kitchen's product adds LoRAs before it rounds.
    """
    traffic = Traffic()
    with torch.no_grad(), _stand_ins(traffic, untried), mock.patch.object(
            int8_epilogue, "adds_before_rounding", return_value=epilogue):
        for count, tokens, rows, columns in LAYERS:
            layer = Traffic()
            input = torch.empty(tokens, columns, dtype=DTYPE, device=META)
            bias = torch.empty(rows, dtype=DTYPE, device=META)
            branch = _branch(rows, columns, RANK * loras) if loras else None
            with layer, mock.patch.object(traffic, "add", layer.add):
                if format_name in HOST_BYTES:
                    out = _multiply_by_host(layer, format_name, input, rows)
                    if branch is not None:
                        add_branch(out, input, branch)
                else:
                    _multiply(format_name, input, rows, bias, branch, fast)
            traffic.launches += count * layer.launches
            traffic.nbytes += count * layer.nbytes
    return traffic


def _multiply(format_name: str, input: torch.Tensor, rows: int, bias: torch.Tensor,
              branch: LowRank | None, fast: bool):
    columns = input.shape[1]
    if format_name == "dense":
        weight = torch.empty(rows, columns, dtype=DTYPE, device=META)
        torch.nn.functional.linear(input, weight, bias)
        return
    packed_format = _format(format_name, columns)
    blocks = rows * columns // packed_format.block_length
    packed = [torch.empty(blocks * packed_format.block_bytes, dtype=torch.uint8, device=META)]
    packed += [torch.empty(qparam.length(blocks), dtype=qparam.dtype, device=META)
               for qparam in packed_format.qparams]
    operands = (None, [], []) if branch is None else branch.operands
    product._linear(input, packed, bias, packed_format.name, rows, *operands, fast)


def _format(name: str, columns: int) -> Format:
    return FAMILIES[name].of_columns(columns) if name in FAMILIES else FORMATS[name]


def _branch(rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(torch.empty(rank, columns, dtype=DTYPE, device=META),
                   (torch.empty(rows, rank, dtype=DTYPE, device=META),), (Slice(0, rows, 0, rank),))


def _multiply_by_host(traffic: Traffic, format_name: str, input: torch.Tensor,
                      rows: int) -> torch.Tensor:
    """Counts comfy_kitchen's product of a layer of ComfyUI's: it quantises the input, multiplies,
    and adds the bias."""
    tokens, columns = input.shape
    out = torch.empty(tokens, rows, dtype=DTYPE, device=META)
    codes = HOST_BYTES[format_name] * columns // 256
    traffic.add(input, tokens * codes)
    traffic.add(tokens * codes, rows * codes, out)
    return out


@contextlib.contextmanager
def _stand_ins(traffic: Traffic, untried: bool) -> Iterator[None]:
    """Counts kernels in place of running them."""

    def dequantize(packed_format, tensors, out, first):
        traffic.add(packed_format.nbytes(out.numel()), out)

    def multiply_few(packed_format, tensors, input, addend, out):
        traffic.add(input, packed_format.nbytes(input.shape[1] * out.shape[1]), out,
                    *([] if addend is None else [addend]))

    def add_rounded(value, change):
        traffic.add(value, change, value)

    def quantize(weight, group_size):
        codes = torch.empty(weight.shape, dtype=torch.int8, device=META)
        traffic.add(weight, codes)
        return codes, torch.empty(len(weight), dtype=torch.float32, device=META)

    def encode(packed_format, tensors, codes, scales, first):
        traffic.add(packed_format.nbytes(codes.numel()), codes)

    def multiply(x, weight, weight_scale, out_dtype, bias=None, residual=None, **_):
        out = torch.empty(len(x), len(weight), dtype=out_dtype, device=META)
        traffic.add(x, x.numel())  # quantises the input
        traffic.add(x.numel(), weight, out, *([] if residual is None else [residual]))
        return out

    runs = {"dequantize": dequantize, "linear": multiply_few, "add_rounded": add_rounded,
            "int8_rows": encode}
    table = [dataclasses.replace(kernel, run=runs[kernel.capability]) for kernel in BACKEND.kernels
             if untried or not kernel.is_untried]

    def look_up(capability, device, packed_format, dtype):
        return tuple(kernel for kernel in table if kernel.capability == capability
                     and kernel.accepts(packed_format, dtype))

    is_smaller = joint_product.is_smaller

    def is_smaller_on_a_gpu(input, *rest):
        on_gpu: Any = types.SimpleNamespace(shape=input.shape, dtype=input.dtype, device=GPU)
        return is_smaller(on_gpu, *rest)

    with mock.patch.object(kernels, "_look_up", look_up), \
            mock.patch.object(joint_product, "is_smaller", is_smaller_on_a_gpu), \
            mock.patch.object(kernels, "_found", {}), \
            mock.patch.object(fast_by_kitchen, "_backend", return_value="cuda"), \
            mock.patch.object(fast_by_kitchen, "_functions", return_value=(quantize, multiply)):
        yield
