"""Brings tensors of Nunchaku's files from the order of its GPU kernels into the order of rows.

All but `wtscale` of a weight of 4 bits are stored in tiles of 128 rows, its vectors too; rows and
columns are filled up to multiples of 128. Codes stay codes: only words move (`repack`), and of
AWQ nibbles.

Sources of the orders: deepcompressor-toolkit 0.1.0 `backend/nunchaku/utils.py`,
`backend/tinychat/utils.py`.
"""
import numpy as np
import torch

from .repack import SLICE_BYTES, copy_permuted, exchange_fields, slices, words_of

TILE = 128  # rows of a tile
RANKS = 16  # rows and columns of a tile of the low rank


def codes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the codes of a weight of (N, K), uint8 (N, K / 2), the low nibble first.

    Args:
        stored: int8 (N, K / 2).
    """
    rows, columns = stored.shape[0], stored.shape[1] * 2
    words = copy_permuted(  # of eight neighbouring columns
        stored, torch.int32, (rows // TILE, columns // 64, 8, 8, 4, 2, 2), (0, 2, 5, 3, 1, 6, 4))
    return words.view(rows, -1).view(torch.uint8)


def numbers_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns 16-bit numbers as (N, groups), of those stored as (groups, N).

    Args:
        stored: scales (groups, N), or a number for each row or column, (N,).
    """
    rows = stored.shape[-1]
    groups = stored.numel() // rows
    numbers = copy_permuted(
        stored, torch.int16, (rows // TILE, groups, 8, 4, 2, 2), (0, 2, 4, 3, 5, 1))
    return numbers.view(rows, groups).view(stored.dtype)


def vector_in_order(stored: torch.Tensor) -> torch.Tensor:
    """Returns a 16-bit number for each row or column, (N,), in their order."""
    return numbers_in_rows(stored.view(-1)).view(-1)


def scale_bytes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the scales of nvfp4 as bytes, uint8 (N, groups).

    Args:
        stored: float8_e4m3fn or their bytes, (groups, N).
    """
    groups, rows = stored.shape
    words = copy_permuted(  # of four neighbouring groups
        stored, torch.int32, (rows // TILE, groups // 4, 8, 4, 4), (0, 4, 3, 2, 1))
    return words.view(rows, -1).view(torch.uint8)


def down_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the factor A of a low rank, (R, K), stored as (K, R)."""
    words = copy_permuted(stored, torch.int32, _low_rank_tiles(stored), (1, 4, 2, 0, 5, 3))
    return words.view(stored.dtype).view(stored.shape[1], stored.shape[0])


def up_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the factor B of a low rank, (N, R), stored in that shape."""
    words = copy_permuted(stored, torch.int32, _low_rank_tiles(stored), (0, 4, 2, 1, 5, 3))
    return words.view(stored.dtype).view(stored.shape)


def _low_rank_tiles(stored: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of 16-bit numbers of (C, R) as words of two neighbours, in their tiles."""
    return stored.shape[0] // RANKS, stored.shape[1] // RANKS, 8, 4, 2, 2


def awq_codes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the codes of AWQ of (N, K), uint8 (N, K / 2), the low nibble first.

    Nibble i of word j of 32 columns belongs to column 8 i + j.

    Args:
        stored: int32 (N / 4, K / 2) or int16 (N / 4, K).
    """
    quads = len(stored)
    columns = stored.nbytes // quads // 2
    # a word has two neighbours of 16 bits: fields 0 to 3 of word 2 m, and of 2 m + 1 above them
    words = words_of(stored).reshape(quads, columns // 64, 4, 2, 2, 2)
    rows = np.empty((quads, 4, columns // 64, 2, 2, 2), words.dtype)
    for part in slices(quads, SLICE_BYTES // (columns * 2)):
        tiles, target = words[part], rows[part]
        planes = np.empty((2, 2, 4, len(tiles), columns // 64, 2), words.dtype)
        for half in range(2):  # long copies, although the last axes of both sides are short
            planes[..., half] = tiles[:, :, :, half].transpose(3, 4, 2, 0, 1)
        exchange_fields(planes[0], planes[1], 16)
        exchange_fields(planes[:, 0], planes[:, 1], 8)
        exchange_fields(planes[0], planes[1], 4)
        for high, low in np.ndindex(2, 2):
            target[..., high, low] = planes[low, high].transpose(1, 0, 2, 3)
    return torch.from_numpy(rows.view(np.uint8).reshape(quads * 4, columns // 2))


def parts_in_order(tensor: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns rows, or numbers of rows, of a modulation, part by part.

    Those of all parts are interleaved in the files: row 0 of each part, then row 1 of each.
    """
    row_bytes = tensor.nbytes // len(tensor)
    rows = copy_permuted(tensor, torch.uint8, (-1, parts, row_bytes), (1, 0, 2))
    return rows.view(-1).view(tensor.dtype).view(tensor.shape)
