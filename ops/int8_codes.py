"""Rows of floats as int8 codes, after a rotation that makes eight bits enough: the reference of the
int8 product's operands.

The rotation is R = r x r (Kronecker) on each group of 256 columns, r = diag(s) h, h the normalised
Hadamard matrix of order 16 and s the signs of a bent function. R is orthogonal, so (x R) (W R)^T =
x W^T. A single large value, which would take the whole range of a row's codes, is spread evenly
over its group (QuaRot, https://arxiv.org/abs/2404.00456). So is, because of s, what values have in
common: without it, the mean of a group would all go into one value.
"""
import functools
import math

import torch

from . import format as base
from .format import Format

GROUP = 256  # columns rotated together
SIDE = 16
LARGEST_CODE = 127
# A row of smaller values has the scale of one whose largest is this, so that no scale is zero.
TINY = 1e-30


@functools.cache
def side_matrix(device: torch.device) -> torch.Tensor:
    """r, (16, 16): entries of a quarter and minus a quarter, row i with the sign of bits 0 and 1,
    xor bits 2 and 3, of i."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < SIDE:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    row = torch.arange(SIDE)
    signs = 1 - 2 * ((row & row >> 1 ^ row >> 2 & row >> 3) & 1)
    return (signs.unsqueeze(-1) * matrix / math.sqrt(SIDE)).to(device)


def rotate(values: torch.Tensor) -> torch.Tensor:
    """`values @ R`. values: float32 or float64 (n, K), contiguous, K a multiple of 256. Returns the
    same dtype and shape."""
    side = side_matrix(values.device).to(values.dtype)
    half = torch.mm(values.view(-1, SIDE), side).view(-1, SIDE, SIDE)
    return torch.bmm(side.t().expand(half.shape), half).view(values.shape)


def quantize_into(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
    """Symmetric codes of each row: values ~ codes * scales.

    values: float32 (n, K), overwritten. codes: int8 (n, K). scales: float32 (n,), NaN where a row
    is not finite, so that the row's products are NaN.
    """
    largest = values.abs().amax(-1)
    torch.div(largest.clamp_min(TINY), LARGEST_CODE, out=scales)
    codes.copy_(values.div_(scales.unsqueeze(-1)).round_())
    scales.masked_fill_(~largest.isfinite(), torch.nan)


def _rows_at_once(columns: int, device: torch.device) -> int:
    return max(
        1, (base.CPU_CHUNK_VALUES if device.type == "cpu" else base.DEVICE_CHUNK_VALUES) // columns)


def encode_tokens(input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
    """Codes of the rows of `input @ R`. input: float (M, K), contiguous. codes: int8 (M, K).
    scales: float32 (M,)."""
    step = _rows_at_once(input.shape[1], input.device)
    for start in range(0, len(input), step):
        part = slice(start, start + step)
        quantize_into(rotate(input[part].float()), codes[part], scales[part])


def encode_rows(packed_format: type[Format], tensors: list[torch.Tensor], codes: torch.Tensor,
                scales: torch.Tensor, value_dtype: torch.dtype | None, first: int,
                dequantize_into=None):
    """Codes of rows of `W R`, W a packed weight.

    tensors, value_dtype, first: see `Format.dequantize_into`; block `first` begins a row. codes:
    int8 (n, K), n the rows wanted.
    scales: float32 (n,). dequantize_into(packed_format, tensors, out, value_dtype, first): what
    dequantises, by default the reference.
    """
    rows, columns = codes.shape
    dequantize_into = dequantize_into or _dequantize_into
    # rows that are whole blocks
    whole = packed_format.block_length // math.gcd(packed_format.block_length, columns)
    step = -(-_rows_at_once(columns, codes.device) // whole) * whole
    values = torch.empty((min(step, rows), columns), dtype=torch.float32, device=codes.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chunk = values[:part.stop - start]
        dequantize_into(packed_format, tensors, chunk, value_dtype,
                        first + start * columns // packed_format.block_length)
        quantize_into(rotate(chunk), codes[part], scales[part])


def _dequantize_into(packed_format, tensors, out, value_dtype, first):
    packed_format.dequantize_into(tensors, out, value_dtype, first)
