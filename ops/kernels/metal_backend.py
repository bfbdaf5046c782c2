"""Kernels for Apple GPUs: Metal in `source/`, compiled by torch at run time. Not yet run on a
Mac, and so used only on request.

Apple GPUs flush float32 subnormals to zero, in torch's operations as in kernels. So values equal
the reference's on that GPU, but differ from a CPU's where a scale is below 2**-118, which only
MXFP4, Q8_K and the formats with separate scales can have.
"""
import functools
from pathlib import Path

import torch

from ..formats.row_layout import RowFormat
from .kernel import Backend, Kernel
from .kernel_source import (
    C_TYPES,
    CHUNK,
    DEQUANTIZED,
    ROW_TENSORS,
    kernel_source,
    row_grid,
)
from .validation import probe

MAX_CHUNKS = 1 << 32  # per launch: Metal counts threads in 32 bits
GROUP = 256  # threads per thread group


@functools.cache
def _compiled(source):
    return torch.mps.compile_shader(source)


@functools.cache
def _shader(kernel, packed_format, dtype):
    """Returns the compiled function, which takes tensors and integers."""
    source = kernel_source("metal", kernel, packed_format, dtype, LANES=CHUNK)
    return getattr(_compiled(source), kernel)


def dequantize(packed_format, tensors, out, first):
    """See `Kernel.run`."""
    if isinstance(packed_format, RowFormat):
        _dequantize_rows(packed_format, tensors, out, first)
        return
    chunks, rest = divmod(out.numel(), CHUNK)
    # The reference handles odd shapes, and lookups of no rows.
    if rest or packed_format.block_length % CHUNK or not 0 < chunks < MAX_CHUNKS:
        packed_format.dequantize_into(tensors, out, first)
        return
    packed = tensors[0].view(-1)[first * packed_format.block_bytes:]
    scales = tensors[1][first:] if packed_format.qparams else packed
    run = _shader("dequantize", packed_format, out.dtype)
    run(out, packed, scales, threads=chunks, group_size=GROUP)


def _dequantize_rows(packed_format, tensors, out, first):
    columns = packed_format.block_length
    rows, rest = divmod(out.numel(), columns)
    if rest or not rows or columns % CHUNK:
        packed_format.dequantize_into(tensors, out, first)
        return
    blocks = packed_format.blocks(tensors, first, first + rows)
    names = "codes", *(qparam.name for qparam in packed_format.qparams)
    tensors = dict(zip(names, blocks))
    fields = [next((tensors[name] for name in names if name in tensors), blocks[0])
              for names in ROW_TENSORS.values()]
    grid, group = row_grid(packed_format, rows)
    run = _shader("dequantize_rows", packed_format, out.dtype)
    run(out, *fields, columns, packed_format.layout.groups, rows,
        threads=[count * size for count, size in zip(grid, group)], group_size=list(group))


BACKEND = Backend("metal", lambda device: probe(dequantize, device),
                  (Kernel("dequantize", DEQUANTIZED, frozenset(C_TYPES), dequantize),),
                  platform="metal", files=(Path(__file__),))
