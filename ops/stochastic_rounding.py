"""Stochastic rounding to 16 bits, and to whole steps: the mean of many values keeps small changes.

A value on the grid of bfloat16 swallows any change below half a step: rounded to the nearest, the
sum is the old value again, and a weak LoRA is gone. Here a value between two steps goes to either,
with a probability that grows as it gets nearer. A hash of the value's own bits decides: the same
value is always rounded in the same way, on every device and however a tensor is split.
"""
from collections.abc import Iterable

import torch

# Knuth's multiplicative hash: 2^32 divided by the golden ratio; odd, so that it is a bijection.
MIX = -1640531527
_CHANCE_BITS = 16
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa
# float16 is subnormal below 2^-14, in steps of 2^-24. There the hash, from -2^31 to 2^31 - 1, is
# the noise added before the cast rounds. It is below half a step by a margin, so that a value on
# the grid stays there, even after float32 has rounded the sum.
LEAST_NORMAL, NOISE = 2.0 ** -14, 2.0 ** -56 * (1 - 1.5 * 2.0 ** -13)
# values that a CPU rounds at a time: the temporaries stay in its cache
_PIECE = 1 << 16


def stochastic_round(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to bfloat16 or float16 without bias. For other dtypes this is `values.to(dtype)`.

    Infinities and NaN stay what they are; what is larger than the largest finite number of `dtype`
    is rounded to the nearest. The gradient is that of `to`.

    Args:
        values: float32, any shape; may be overwritten.
        dtype: of the result.
    """
    if dtype not in _DROPPED_BITS or values.dtype != torch.float32:
        return values.to(dtype)
    if values.requires_grad:
        return _StochasticRound.apply(values, dtype)
    return _by_bits(values, dtype)


class _StochasticRound(torch.autograd.Function):
    """Gives arithmetic on bits the gradient of a cast."""

    @staticmethod
    def forward(ctx, values, dtype):
        return _by_bits(values, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float(), None


def stochastic_round_to_integers(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Rounds `values / step` to integers without bias.

    Args:
        values: float32.
        step: float32, of a shape that broadcasts with that of `values`.

    Returns:
        The integers, float32.
    """
    steps = values / step
    lower = steps.floor()
    chance = _upper(_hash(values), _CHANCE_BITS)
    return lower.add_(steps.sub_(lower) * (1 << _CHANCE_BITS) > chance)


def _hash(values: torch.Tensor) -> torch.Tensor:
    """Hashes the bits of each float32 to an int32."""
    return values.view(torch.int32).mul(MIX)


def _upper(hashes: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the upper `count` bits of each hash, from 0 to 2^count - 1, in place."""
    return hashes.bitwise_right_shift_(32 - count).bitwise_and_((1 << count) - 1)


def _by_bits(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(values, dtype=dtype)
    for piece, rounded in pieces(values, out):
        rounded.copy_(on_the_grid(piece, dtype))
    return out


def pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Returns tensors of one shape in pieces that stay in a CPU's cache, elsewhere whole."""
    in_pieces = not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return zip(*(tensor.view(-1).split(_PIECE) for tensor in tensors)) if in_pieces else [tensors]


def on_the_grid(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns float32 values that a cast to `dtype` turns into the rounded ones."""
    dropped, largest = _DROPPED_BITS[dtype], torch.finfo(dtype).max
    normal = values.clamp(-largest, largest)
    if dtype == torch.float16:
        normal = torch.nn.functional.hardshrink(normal, LEAST_NORMAL)  # zero for what is not
    less = normal - values  # zero where the value is normal and finite, NaN for NaN
    hashes = _hash(values)
    if dtype == torch.float16:
        less.sub_(hashes, alpha=NOISE)
    bits = _upper(hashes, dropped).add_(normal.view(torch.int32)).bitwise_and_(-1 << dropped)
    return bits.view(torch.float32).sub_(less)
