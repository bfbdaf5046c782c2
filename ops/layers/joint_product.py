"""The product with a weight and the branch of its LoRAs as one, on GPUs that torch calls "cuda".

[x | x A^T] [W | B]^T + bias is one sum in float32, rounded once. The input is copied into rows with
room for x A^T, and the weight is dequantised into rows with room for B. Apart, the branch is
written, read, added to, and read again for the bias.
"""
import functools
import os

import torch

from .. import kernels
from ..formats.base import Format
from ..low_rank import LowRank
from . import workspace

VARIABLE = "FEATHERWEIGHT_LORA"  # "apart" turns this off
INPUT_BYTES = 64 << 20  # of the input that are copied at a time
# Values: products read 16 bytes of a row at a time, and rows begin at multiples of 128 bytes.
WIDTH_MULTIPLE, PITCH_MULTIPLE = 8, 64
MAX_RANK_SHARE = 1 / 4  # of the columns: more would cost the product itself too much


def is_smaller(input: torch.Tensor, packed_format: Format, rows: int, has_bias: bool,
               low_rank: LowRank) -> bool:
    """Returns whether `linear` can compute a product and moves fewer bytes than both parts apart.

    For a token it moves three times the input's values. Apart, the branch writes the output, the
    product reads and writes it, and so does the bias; the input is read once more.

    Args:
        input: (M, K).
        packed_format: of the weight (N, K), without a low rank of its own.
        rows: N.
        has_bias: whether there is a bias.
        low_rank: of the layer.
    """
    tokens, columns = input.shape
    rank = low_rank.down.shape[0]
    if (input.device.type != "cuda" or columns % WIDTH_MULTIPLE
            or rank > columns * MAX_RANK_SHARE or is_off()):
        return False
    row_bytes = _pitch(columns, rank) * input.dtype.itemsize
    if tokens * row_bytes > INPUT_BYTES and rows * row_bytes > workspace.workspace_bytes(
            input.device):
        return False  # a slice of one would be made again for each slice of the other
    apart = tokens * (columns + (4 if has_bias else 2) * rows)
    joint = tokens * 3 * columns + 2 * rows * rank
    if packed_format.plain_dtype == input.dtype or not kernels.dequantizes_with_pitch(
            packed_format, input.device, input.dtype, columns):
        joint += 2 * rows * columns  # the weight is copied
    return joint < apart


@functools.cache
def is_off() -> bool:
    """Returns whether the user has products and branches computed apart."""
    return os.environ.get(VARIABLE) == "apart"


def linear(input: torch.Tensor, packed_format: Format, packed: list[torch.Tensor], rows: int,
           bias: torch.Tensor | None, low_rank: LowRank) -> torch.Tensor:
    """Computes `input W^T + bias` plus a branch, where `is_smaller` allows it.

    Args:
        input: (M, K).
        packed_format, packed: the weight (N, K), without a low rank of its own.
        rows: N.
        bias: (N,) or None.
        low_rank: in the dtype of `input`.

    Returns:
        (M, N).
    """
    tokens, columns = input.shape
    rank = low_rank.down.shape[0]
    pitch = _pitch(columns, rank)
    width = columns - rank // -WIDTH_MULTIPLE * WIDTH_MULTIPLE
    row_bytes = pitch * input.dtype.itemsize
    row_step = min(rows, workspace.rows_within(workspace.workspace_bytes(input.device),
                                               packed_format, columns, row_bytes))
    token_step = tokens if row_step < rows else min(tokens, max(1, INPUT_BYTES // row_bytes))
    out = input.new_empty((tokens, rows))
    joined = None
    for row in range(0, rows, row_step):
        of_rows = slice(row, min(rows, row + row_step))
        weight = input.new_empty((of_rows.stop - row, pitch))[:, :width]
        kernels.dequantize_into(packed_format, packed, weight[:, :columns],
                                row * columns // packed_format.block_length)
        low_rank.write_up(weight[:, columns:], row)
        for token in range(0, tokens, token_step):
            of_tokens = slice(token, token + token_step)
            if joined is None or token_step < tokens:
                joined = None  # its memory is free for the next
                joined = _joined(input[of_tokens], low_rank.down, pitch, width)
            part = out[of_tokens, of_rows]
            if bias is None:
                torch.mm(joined, weight.t(), out=part)
            else:
                torch.addmm(bias[of_rows], joined, weight.t(), out=part)
    return out


def _joined(input: torch.Tensor, down: torch.Tensor, pitch: int, width: int) -> torch.Tensor:
    """Returns [x | x A^T | zeros], `width` columns."""
    (tokens, columns), end = input.shape, input.shape[1] + down.shape[0]
    joined = input.new_empty((tokens, pitch))[:, :width]
    joined[:, :columns] = input
    torch.mm(input, down.t(), out=joined[:, columns:end])
    if end < width:
        joined[:, end:] = 0
    return joined


def _pitch(columns: int, rank: int) -> int:
    """Returns the values from one row to the next."""
    return -((columns + rank) // -PITCH_MULTIPLE) * PITCH_MULTIPLE
