"""Kernels for Apple GPUs: Metal in `source/`, compiled by torch at run time. Not yet run on a Mac.

Apple GPUs flush float32 subnormals to zero, in torch's operations as in kernels. So values equal
the reference's on that GPU, but differ from a CPU's where a scale is below 2**-118, which only
MXFP4, Q8_K and the formats with separate scales can have.
"""
import functools

import torch

from .kernel import Backend, Kernel
from .kernel_source import (
    C_TYPES,
    FORMAT_NAMES,
    ROW_FAMILIES,
    kernel_source,
    row_chunk,
    row_definitions,
)
from .validation import probe

CHUNK = 8  # values per thread, LANES in source/metal
MAX_CHUNKS = 1 << 32  # per launch: Metal counts threads in 32 bits
GROUP = 256  # threads per thread group


@functools.cache
def _shader(packed_format, dtype):
    """Returns the compiled function, which takes tensors."""
    source = kernel_source("metal", "dequantize", packed_format, dtype, LANES=CHUNK)
    return torch.mps.compile_shader(source).dequantize


def dequantize(packed_format, tensors, out, first):
    """See `Kernel.run`."""
    chunks, rest = divmod(out.numel(), CHUNK)
    # The reference handles odd shapes, and lookups of no rows.
    if rest or packed_format.block_length % CHUNK or not 0 < chunks < MAX_CHUNKS:
        packed_format.dequantize_into(tensors, out, first)
        return
    packed = tensors[0].view(-1)[first * packed_format.block_bytes:]
    scales = tensors[1][first:] if packed_format.qparams else packed
    _shader(packed_format, out.dtype)(out, packed, scales, threads=chunks,
                                                   group_size=GROUP)


@functools.cache
def _row_shader(packed_format, dtype):
    """Returns the compiled function, which takes tensors."""
    source = kernel_source("metal", "dequantize_rows", None, dtype, LANES=CHUNK,
                           **row_definitions(packed_format))
    return torch.mps.compile_shader(source).dequantize_rows


def dequantize_rows(packed_format, tensors, out, first):
    """See `Kernel.run`; for the families of `ROW_FAMILIES`."""
    chunk = row_chunk(packed_format)
    rows, rest = divmod(out.numel(), packed_format.block_length)
    if rest or not rows or not chunk or out.numel() // chunk >= MAX_CHUNKS:
        packed_format.dequantize_into(tensors, out, first)
        return
    packed, *qparams = packed_format.blocks(tensors, first, first + rows)
    scales, row_scales = qparams[0].view(torch.uint8), qparams[-1]
    if row_scales.dtype == torch.uint8:
        row_scales = packed_format.constant("scale_numbers", out.device)
    _row_shader(packed_format, out.dtype)(out, packed, scales, row_scales,
                                                       threads=out.numel() // chunk,
                                                       group_size=GROUP)


BACKEND = Backend("metal", lambda device: probe(dequantize, device),
                  (Kernel("dequantize", FORMAT_NAMES, frozenset(C_TYPES), dequantize),
                   Kernel("dequantize", frozenset(ROW_FAMILIES), frozenset(C_TYPES),
                          dequantize_rows)))
