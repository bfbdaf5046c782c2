"""Repacks codes that stand in tiles or words: whole words move, and bits in the cache of a core.

NumPy copies strided elements about twice as fast as torch. On Linux its large arrays are in huge
pages; without them the system spends as long on clearing small pages as a copy takes. One thread
does it all: operations as short as these wait for each other longer than two threads save.
"""
from collections.abc import Sequence

import numpy as np
import torch

SLICE_BYTES = 1 << 19  # whose fields are exchanged at a time, in the cache of a core
MASKS = {16: 0x0000FFFF, 8: 0x00FF00FF, 4: 0x0F0F0F0F}  # lower field of each two, of so many bits
ROWS = 64  # of words, transposed at a time


def copy_permuted(stored: torch.Tensor, dtype: torch.dtype, shape: Sequence[int],
                  order: Sequence[int]) -> torch.Tensor:
    """Returns the elements of a tensor in another order of its axes.

    Args:
        stored: of any dtype.
        dtype: an integer dtype, whose elements are moved whole.
        shape: of `stored` in that dtype; -1 for one size.
        order: of these axes in the result.

    Returns:
        `dtype` in the permuted shape, contiguous.
    """
    return torch.from_numpy(_array(stored, dtype).reshape(shape).transpose(order).copy())


def transpose_words(words: torch.Tensor) -> torch.Tensor:
    """Returns the transposed matrix, (C, R), of int32 words (R, C)."""
    source = _array(words, words.dtype).reshape(words.shape)
    target = np.empty(source.shape[::-1], source.dtype)
    for rows in slices(len(source), ROWS):
        target[:, rows] = source[rows].T
    return torch.from_numpy(target)


def words_of(stored: torch.Tensor) -> np.ndarray:
    """Returns the words of 32 bits of a tensor, uint32, flat and read-only."""
    return _array(stored, torch.int32).view(np.uint32)


def exchange_fields(first: np.ndarray, second: np.ndarray, bits: int):
    """Exchanges the upper field of each pair of fields in `first` with the lower one in `second`.

    Args:
        first, second: uint32 of the same shape; changed in place.
        bits: of a field, 4, 8 or 16.
    """
    changed = first >> bits
    changed ^= second
    changed &= MASKS[bits]
    second ^= changed
    changed <<= bits
    first ^= changed


def slices(count: int, length: int) -> list[slice]:
    """Returns slices of `length`, or of one, that cover the first `count` rows."""
    step = max(1, length)
    return [slice(first, first + step) for first in range(0, count, step)]


def _array(stored: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Returns the elements of a tensor in an integer dtype, flat."""
    array = stored.contiguous().view(-1).view(dtype).numpy()
    array.flags.writeable = False  # it may be mapped memory, and a write there ends the process
    return array
