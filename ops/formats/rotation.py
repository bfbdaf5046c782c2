"""Rotations of groups of columns: Kronecker powers of small Hadamard matrices."""
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
