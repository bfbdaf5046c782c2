"""Fields of bytes: what formats take apart and put together, four bytes at a time where they can.

A CPU makes many small passes over a chunk that stays in its cache. Elsewhere each pass is a launch
of a kernel and goes through memory, so what is one operation there may be several on a CPU, and the
other way about. Both give the same bits.
"""
import functools
import math

import torch

# The threads of a CPU share a table lookup in pieces of this many entries.
LOOKUP_PIECE = 4096


def passes_are_cheap(device: torch.device) -> bool:
    """Whether several passes of simple kinds are better there than one of a complicated kind."""
    return device.type == "cpu"


def reinterpret(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of `data`, uint8, as numbers of a wider `dtype`; the last dimension shrinks. May
    share its memory.

    A view, where the addresses of all numbers are multiples of their size, otherwise a copy.
    """
    if any(number % dtype.itemsize for number in (data.storage_offset(), *data.stride()[:-1])):
        # `contiguous` leaves a single row at the address it has
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)


def half(blocks: torch.Tensor, offset: int, count: int = 1) -> torch.Tensor:
    """The float16 scales from byte `offset` of each block on, as float32 (n, count)."""
    return reinterpret(blocks[:, offset:offset + 2 * count], torch.float16).float()


def half_bytes(scales: torch.Tensor) -> torch.Tensor:
    """The bytes, uint8 (n, 2), of float16 scales given as float32 (n, 1); the inverse of `half`."""
    return scales.half().contiguous().view(torch.uint8)


def bit_planes(data: torch.Tensor, width: int) -> torch.Tensor:
    """All fields of `width` bits of every byte, lowest bits first, each in a byte of its own.

    data: uint8 (..., B), B a multiple of 4. Returns uint8 (..., 8 // width, B): plane i holds field
    i of the B bytes. Works on four bytes at a time in int32 lanes: faster than shifting bytes,
    which also crashes on some Intel GPUs.
    """
    if passes_are_cheap(data.device):
        lanes = data.clone(memory_format=torch.contiguous_format).view(torch.int32)
        planes = torch.stack([lanes >> shift if shift else lanes for shift in range(0, 8, width)],
                             -2)
    else:
        planes = reinterpret(data, torch.int32).unsqueeze(-2) >> shifts(
            width, 8 // width, data.device
        ).unsqueeze(-1)
    mask = ((1 << width) - 1) * 0x01010101
    return planes.bitwise_and_(mask).view(torch.uint8)


def join_planes(fields: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """Bytes that hold 8 / width fields each; the inverse of `bit_planes` on runs of `run` bytes.

    fields: uint8 (n, F), below 2 ** width. Each `run` bytes hold the next 8 / width runs of as many
    fields, the first in the lowest bits. Returns uint8 (n, F * width / 8).
    """
    runs = fields.view(len(fields), -1, 8 // width, run)
    packed = runs[:, :, 0].clone()
    for index in range(1, 8 // width):
        packed |= runs[:, :, index] << index * width
    return packed.view(len(fields), -1)


def split_bits(words: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """The `count` lowest fields of `width` bits of every word, lowest first.

    words: any integer dtype, any shape. Returns int32 (*words.shape, count).
    """
    return (words.unsqueeze(-1) >> shifts(width, count, words.device)).bitwise_and_((1 << width) -
                                                                                    1)


@functools.cache
def shifts(width: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 (count,): 0, width, 2 width and so on. Made once: to fill a tensor on a device is a
    launch, too. It is copied there, which is waited for, as other streams use it."""
    return torch.arange(0, count * width, width, dtype=torch.int32).to(device)


def bit_table(clear: int, raised: int) -> torch.Tensor:
    """A table for `lookup`, int64 (256,): eight int8 values for every byte, one per bit, lowest bit
    first."""
    bits = (torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1).bool()
    return torch.where(bits, raised, clear).to(torch.int8).view(torch.int64).view(-1)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a codebook of small integers.

    table: (entries,) of int16, int32 or int64, each entry being 2, 4 or 8 int8 values side by side:
    one gather fetches them all. index: any integer dtype and shape. Returns int8 (*index.shape,
    values per entry).
    """
    return select(table, index).view(torch.int8).view(*index.shape, table.element_size())


def select(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entries of `table` that `index` names, (n,), on all threads of a CPU. table: (entries,).
    index: integers."""
    if index.device.type != "cpu" or torch.get_num_threads() == 1:
        return table.index_select(0, index.int().reshape(-1))
    # `index_select` runs on one thread, and what it leaves in the cache of that core takes the
    # others longer to fetch than the lookup itself. `gather` gives each thread the part that it has
    # in the operations before and after, too.
    pieces = index.long().reshape(-1, math.gcd(index.numel(), LOOKUP_PIECE))
    return table.expand(len(pieces), -1).gather(1, pieces).view(-1)
