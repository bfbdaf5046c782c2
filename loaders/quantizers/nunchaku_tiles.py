"""Brings tensors of Nunchaku's files from the order of its GPU kernels into the order of rows.

All but `wtscale` of a weight of 4 bits are stored in tiles of 128 rows, its vectors too; rows and
columns are filled up to multiples of 128. Codes stay codes: only bytes and words move.

Sources of the orders: deepcompressor-toolkit 0.1.0 `backend/nunchaku/utils.py`,
`backend/tinychat/utils.py`.
"""
import torch

TILE = 128  # rows of a tile
RANKS = 16  # rows and columns of a tile of the low rank


def codes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the codes of a weight of (N, K), uint8 (N, K / 2), the low nibble first.

    Args:
        stored: int8 (N, K / 2).
    """
    rows, columns = stored.shape[0], stored.shape[1] * 2
    words = stored.contiguous().view(-1).view(torch.int32)  # of eight neighbouring columns
    words = words.view(rows // TILE, columns // 64, 8, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 6, 4)
    return words.reshape(rows, -1).view(torch.uint8)


def numbers_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns 16-bit numbers as (N, groups), of those stored as (groups, N).

    Args:
        stored: scales (groups, N), or a number for each row or column, (N,).
    """
    rows = stored.shape[-1]
    groups = stored.numel() // rows
    tiles = stored.contiguous().view(rows // TILE, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def vector_in_order(stored: torch.Tensor) -> torch.Tensor:
    """Returns a 16-bit number for each row or column, (N,), in their order."""
    return numbers_in_rows(stored.view(-1)).view(-1)


def scale_bytes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the scales of nvfp4 as bytes, uint8 (N, groups).

    Args:
        stored: float8_e4m3fn or their bytes, (groups, N).
    """
    groups, rows = stored.shape
    tiles = stored.contiguous().view(torch.uint8).view(rows // TILE, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def down_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the factor A of a low rank, (R, K), stored as (K, R)."""
    tiles = _low_rank_tiles(stored)
    return tiles.permute(1, 2, 0, 3).reshape(stored.shape[1], stored.shape[0])


def up_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the factor B of a low rank, (N, R), stored in that shape."""
    return _low_rank_tiles(stored).permute(0, 2, 1, 3).reshape(stored.shape)


def _low_rank_tiles(stored: torch.Tensor) -> torch.Tensor:
    """Returns 16-bit numbers of (C, R) as (C / 16, R / 16, 16, 16)."""
    features, ranks = (length // RANKS for length in stored.shape)
    tiles = stored.contiguous().view(features, ranks, 8, 4, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    return tiles.reshape(features, ranks, RANKS, RANKS)


def awq_codes_in_rows(stored: torch.Tensor) -> torch.Tensor:
    """Returns the codes of AWQ of (N, K), uint8 (N, K / 2), the low nibble first.

    Nibble i of word j of 32 columns belongs to column 8 i + j.

    Args:
        stored: int32 (N / 4, K / 2) or int16 (N / 4, K).
    """
    quads = len(stored)
    columns = stored.nbytes // quads // 2
    words = stored.contiguous().view(-1).view(torch.uint8).view(-1, 4, 2, 2)
    first, second = words.unbind(2)  # of each two neighbours: (n, 4, bytes of a word)
    codes = torch.stack([first & 15 | second << 4, first >> 4 | second & 0xF0], -1)
    rows = codes.view(-1, 4, 4).transpose(1, 2).reshape(quads, columns // 64, 4, 32)
    return rows.transpose(1, 2).reshape(quads * 4, columns // 2)


def parts_in_order(tensor: torch.Tensor, parts: int) -> torch.Tensor:
    """Returns rows, or numbers of rows, of a modulation, part by part.

    Those of all parts are interleaved in the files: row 0 of each part, then row 1 of each.
    """
    rows = tensor.view(-1, parts, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)
