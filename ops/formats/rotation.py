"""Rotations of groups of columns: Kronecker powers of small Hadamard matrices.

A product with `rotation_signs` sums integers exactly, in whichever order. Other numbers are summed
in the order of `rotate`, which kernels share, since a product of BLAS has none.
"""
import torch

from ..lasting_memory import cached_on_device

# size -> the matrix whose Kronecker powers, over their roots, are rotations
HADAMARD = {2: ((1, 1), (1, -1)), 4: ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))}


@cached_on_device
def rotation_signs(size: int, device: torch.device, base: int = 4) -> torch.Tensor:
    """Returns a rotation times the root of its size, float32 (size, size), symmetric, of +-1.

    Args:
        size: of the rotation, a power of `base`.
        device: of the result.
        base: a key of `HADAMARD`.
    """
    power = torch.ones((1, 1), dtype=torch.float32)
    matrix = torch.tensor(HADAMARD[base], dtype=torch.float32)
    while len(power) < size:
        power = torch.kron(power, matrix)
    return power.to(device)


def rotate(rows: torch.Tensor, size: int, base: int) -> torch.Tensor:
    """Returns rows times a rotation times the root of its size, each sum in one order.

    The numbers of a group are added and subtracted in pairs, or in fours, of which the next ones
    are `stride` apart: 1, then `base` times as many. Of a pair (a, b) become (a + b, a - b); of
    four (a, b, c, d) become (p + s, p - s, r + q, r - q) of p = a + b, q = a - b, r = c + d and
    s = c - d.

    Args:
        rows: float32 (n, K), K a multiple of `size`.
        size, base: as `rotation_signs` takes them.

    Returns:
        float32 (n, K) in new memory.
    """
    now = rows.contiguous()
    spare = [torch.empty_like(now), torch.empty_like(now)]  # each holds every second sum
    stride = 1
    while stride < size:
        shape = (-1, base, stride)
        numbers, sums = now.view(shape).unbind(1), spare[0].view(shape).unbind(1)
        for place in range(0, base, 2):
            torch.add(*numbers[place:place + 2], out=sums[place])
            torch.sub(*numbers[place:place + 2], out=sums[place + 1])
        now, spare = spare[0], spare[::-1]
        if base == 4:
            first, second, third, fourth = spare[0].view(shape).unbind(1)
            torch.add(sums[0], sums[3], out=first)
            torch.sub(sums[0], sums[3], out=second)
            torch.add(sums[2], sums[1], out=third)
            torch.sub(sums[2], sums[1], out=fourth)
            now, spare = spare[0], spare[::-1]
        stride *= base
    return now
