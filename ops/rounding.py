"""Rounding to 16 bits, and to whole steps, that loses nothing weak on average.

A value that already lies on the grid of bfloat16 swallows any change below half a step: rounded to the nearest, the sum is the
old value again, and a weak LoRA is gone. Here a value between two steps goes to either, each as often as it is near, so that
the mean of many values keeps the change. The choice is made by the value's own bits: the same value is always rounded alike,
on every device and however a tensor is cut.
"""
import torch

_MIX = -1640531527  # 2^32 divided by the golden ratio, as Knuth's multiplicative hash has it; odd, so that it is a bijection
_LOW = (1 << 16) - 1  # the hash's upper half is what decides
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa


def dithered(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`, without bias for bfloat16 and float16; as `to` has it for all others, and the gradient for all.

    values: float32, any shape; may be overwritten. Infinities and NaN stay what they are.
    """
    if dtype not in _DROPPED_BITS or values.dtype != torch.float32:
        return values.to(dtype)
    return _Dithered.apply(values, dtype) if values.requires_grad else _by_bits(values, dtype)


class _Dithered(torch.autograd.Function):
    """Bits have no gradient: it is that of a cast."""

    @staticmethod
    def forward(ctx, values, dtype):
        return _by_bits(values, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float(), None


def dithered_steps(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Whole numbers of steps for values, without bias. values, step: float32, of shapes that go together. Returns float32."""
    steps = values / step
    lower = steps.floor()
    return lower.add_(steps.sub_(lower) * (_LOW + 1) > _chance(values.view(torch.int32)))


def _chance(bits: torch.Tensor) -> torch.Tensor:
    """A number from 0 to 2^16 - 1 for the bits of a float32."""
    return bits.mul(_MIX).bitwise_right_shift_(16).bitwise_and_(_LOW)


def _by_bits(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dropped = _DROPPED_BITS[dtype]
    bits = values.view(torch.int32)
    return _chance(bits).bitwise_right_shift_(16 - dropped).add_(bits).bitwise_and_(-1 << dropped).view(torch.float32).to(dtype)


def weak_sum(value: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`value + change` in the dtype of `value`, where the change may be far below a step of the value."""
    if value.dtype.itemsize > 2:
        return value + change
    return dithered(value.float() + change, value.dtype)
