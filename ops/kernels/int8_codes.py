"""Rotates rows of floats and encodes them in int8: the reference of the int8 product's operands.

The rotation R is that of ComfyUI's int8_convrot, of each group of 256 columns, and makes eight bits
enough. It is orthogonal, so (x R) (W R)^T = x W^T. A single large value, which would take the whole
range of a row's codes, is spread evenly over its group, and so is a group's mean (QuaRot,
https://arxiv.org/abs/2404.00456).
"""
import math
from collections.abc import Callable

import torch

from ..formats import rotation
from ..formats.base import Format, chunk_values, dequantize_by_reference

GROUP = 256  # columns that are rotated together
LARGEST_CODE = 127
# A row whose largest value is smaller gets the scale of this one, so that no scale is zero.
TINY = 1e-30


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Returns `values @ R`.

    Args:
        values: float32 or float64 (n, K), K a multiple of 256.
    """
    return rotation.rotate(values, GROUP, base=4).mul_(GROUP ** -0.5)


def quantize_into(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
    """Writes symmetric codes of each row, so that values ~ codes * scales.

    Args:
        values: float32 (n, K), overwritten.
        codes: output, int8 (n, K).
        scales: output, float32 (n,); NaN where a row is not finite, so that its products are NaN.
    """
    largest = values.abs().amax(-1)
    torch.div(largest.clamp_min(TINY), LARGEST_CODE, out=scales)
    codes.copy_(values.div_(scales.unsqueeze(-1)).round_())
    scales.masked_fill_(~largest.isfinite(), torch.nan)


def encode_tokens(input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor):
    """Writes the codes of the rows of `input @ R`.

    Args:
        input: float (M, K), contiguous.
        codes: output, int8 (M, K).
        scales: output, float32 (M,).
    """
    step = max(1, chunk_values(input.device) // input.shape[1])
    for start in range(0, len(input), step):
        part = slice(start, start + step)
        quantize_into(rotate(input[part].float()), codes[part], scales[part])


def encode_rows(packed_format: Format, tensors: list[torch.Tensor], codes: torch.Tensor,
                scales: torch.Tensor, first: int,
                dequantize_into: Callable = dequantize_by_reference):
    """Writes the codes of n rows of `W R`, W a packed weight.

    Args:
        packed_format: of the weight.
        tensors: see `Format.dequantize_into`.
        codes: output, int8 (n, K).
        scales: output, float32 (n,).
        first: block of the weight that begins the first row.
        dequantize_into: what dequantises, with the arguments of `dequantize_by_reference`.
    """
    rows, columns = codes.shape
    # fewest rows that are whole blocks
    group = packed_format.block_length // math.gcd(packed_format.block_length, columns)
    step = -(-max(1, chunk_values(codes.device) // columns) // group) * group
    values = torch.empty((min(step, rows), columns), dtype=torch.float32, device=codes.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chunk = values[:part.stop - start]
        dequantize_into(packed_format, tensors, chunk,
                        first + start * columns // packed_format.block_length)
        quantize_into(rotate(chunk), codes[part], scales[part])
