"""Splits and joins the bit fields of packed formats, four bytes at a time where possible.

A CPU makes many small passes over a chunk that stays in its cache. On other devices each pass is a
kernel launch and goes through memory. So a step may be one operation on one kind of device and
several on the other. Both give the same bits.
"""
import math

import torch

from ..lasting_memory import cached_on_device

# The threads of a CPU share a table lookup in pieces of this many entries.
LOOKUP_PIECE = 4096


def passes_are_cheap(device: torch.device) -> bool:
    """Returns whether several simple passes are faster on `device` than one complicated pass."""
    return device.type == "cpu"


def reinterpret(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the bytes of `data`, uint8, as numbers of a wider `dtype`; the last axis shrinks.

    A view where the addresses of all numbers are multiples of their size, otherwise a copy.
    """
    if any(number % dtype.itemsize for number in (data.storage_offset(), *data.stride()[:-1])):
        # `contiguous` leaves a single row at the address it has
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)


def half(blocks: torch.Tensor, offset: int, count: int = 1) -> torch.Tensor:
    """Returns the float16 scales from byte `offset` of each block on, as float32 (n, count)."""
    return reinterpret(blocks[:, offset:offset + 2 * count], torch.float16).float()


def half_bytes(scales: torch.Tensor) -> torch.Tensor:
    """Returns the bytes, uint8 (n, 2), of float16 scales in float32 (n, 1); inverts `half`."""
    return scales.half().contiguous().view(torch.uint8)


def bit_planes(data: torch.Tensor, width: int) -> torch.Tensor:
    """Splits every byte into fields of `width` bits, lowest bits first.

    Works on four bytes at a time in int32 lanes: faster than shifting bytes, which also crashes on
    some Intel GPUs.

    Args:
        data: uint8 (..., B), B a multiple of 4.
        width: bits of a field, a divisor of 8.

    Returns:
        uint8 (..., 8 // width, B): plane i holds field i of the B bytes.
    """
    if passes_are_cheap(data.device):
        lanes = data.clone(memory_format=torch.contiguous_format).view(torch.int32)
        planes = torch.stack(
            [lanes >> shift if shift else lanes for shift in range(0, 8, width)], -2)
    else:
        lanes = reinterpret(data, torch.int32)
        planes = lanes.unsqueeze(-2) >> shifts(width, 8 // width, data.device).unsqueeze(-1)
    mask = ((1 << width) - 1) * 0x01010101
    return planes.bitwise_and_(mask).view(torch.uint8)


def join_planes(fields: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """Joins 8 / width fields into each byte; inverts `bit_planes` on runs of `run` bytes.

    Args:
        fields: uint8 (n, F), below 2 ** width.
        width: bits of a field, a divisor of 8.
        run: bytes in a run. It holds the next 8 / width runs of `run` fields, the first of them in
            the lowest bits.

    Returns:
        uint8 (n, F * width / 8).
    """
    runs = fields.view(len(fields), -1, 8 // width, run)
    packed = runs[:, :, 0].clone()
    for index in range(1, 8 // width):
        packed.add_(runs[:, :, index], alpha=1 << index * width)  # a shift of bytes
    return packed.view(len(fields), -1)


def split_bits(words: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Returns the `count` lowest fields of `width` bits of every word, lowest first.

    Args:
        words: any integer dtype, any shape.
        width: bits of a field.
        count: fields of a word.

    Returns:
        int32 (*words.shape, count).
    """
    fields = words.unsqueeze(-1) >> shifts(width, count, words.device)
    return fields.bitwise_and_((1 << width) - 1)


@cached_on_device
def shifts(width: int, count: int, device: torch.device) -> torch.Tensor:
    """Returns int32 (count,): 0, width, 2 width and so on.

    Cached, because filling a tensor on a device is a launch too. It is made on the CPU because the
    copy to the device is synchronous, and other streams use it.
    """
    return torch.arange(0, count * width, width, dtype=torch.int32).to(device)


def bit_table(clear: int, raised: int) -> torch.Tensor:
    """Returns a table for `lookup`, int64 (256,): eight int8 values for every byte, one per bit.

    Args:
        clear: value of a clear bit.
        raised: value of a set bit. The lowest bit comes first.
    """
    bits = (torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1).bool()
    return torch.where(bits, raised, clear).to(torch.int8).view(torch.int64).view(-1)


def byte_pairs(numbers: torch.Tensor, high_first: bool = False) -> torch.Tensor:
    """Returns a table for `select`, int64 (256,): the two numbers of every byte side by side.

    Args:
        numbers: float32 (16,), of the codes of 4 bits.
        high_first: whether the high nibble's comes first.
    """
    codes = torch.arange(256)
    pairs = [numbers[codes & 15], numbers[codes >> 4]]
    return torch.stack(pairs[::-1] if high_first else pairs, -1).view(torch.int64).view(-1)


def lookup(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns entries of a codebook of small integers.

    Args:
        table: (entries,) of int16, int32 or int64, each entry being 2, 4 or 8 int8 values side by
            side: one gather fetches them all.
        index: any integer dtype and shape.

    Returns:
        int8 (*index.shape, values per entry).
    """
    return select(table, index).view(torch.int8).view(*index.shape, table.element_size())


def select(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns `table[index]`, (n,), on all threads of a CPU.

    Args:
        table: (entries,).
        index: integers, n of them in any shape.
    """
    if index.device.type != "cpu" or torch.get_num_threads() == 1:
        return table.index_select(0, index.int().reshape(-1))
    # `index_select` runs on one thread and leaves the result in the cache of that core, from which
    # the other cores fetch it more slowly than the lookup takes. `gather` gives each thread the
    # same part as the operations before and after do.
    pieces = index.long().reshape(-1, math.gcd(index.numel(), LOOKUP_PIECE))
    return table.expand(len(pieces), -1).gather(1, pieces).view(-1)


def split_stream(data: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the fields of `width` bits of a stream of bytes, the lowest bit first.

    Args:
        data: uint8 (..., B), B a multiple of `width`.
        width: bits of a field, below 8.

    Returns:
        int32 (..., B * 8 / width).
    """
    pieces = data.unflatten(-1, (data.shape[-1] // width, width)).int()
    if width < 4:
        fields = split_bits(_joined_bytes(pieces), width, 8)
    else:  # the first four of eight fields lie in the first four bytes, the others in the last four
        upper = _joined_bytes(pieces[..., -4:]) >> 32 - 4 * width
        words = torch.stack([_joined_bytes(pieces[..., :4]), upper], -1)
        fields = split_bits(words, width, 4)
    return fields.flatten(data.ndim - 1)


def _joined_bytes(pieces: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of the last axis, at most 4 in int32, as one integer."""
    words = pieces[..., 0]
    for index in range(1, pieces.shape[-1]):
        words = words | pieces[..., index] << 8 * index
    return words
