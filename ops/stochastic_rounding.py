"""Rounding to 16 bits, and to whole steps, that loses nothing weak on average.

A value that already lies on the grid of bfloat16 swallows any change below half a step: rounded to
the nearest, the sum is the old value again, and a weak LoRA is gone. Here a value between two steps
goes to either, each as often as it is near, so that the mean of many values keeps the change. The
choice is made by the value's own bits: the same value is always rounded alike, on every device and
however a tensor is cut.
"""
import torch

# 2^32 divided by the golden ratio, as Knuth's multiplicative hash has it; odd, so that it is a
# bijection
_MIX = -1640531527
_CHANCE_BITS = 16
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa
# float16 is subnormal below 2^-14, in steps of 2^-24. There the hash, from -2^31 to 2^31 - 1, is
# the noise that is added before the cast rounds: so much less than half a step that what lies on
# the grid stays, in what float32 makes of the sum too.
_LEAST_NORMAL, _NOISE = 2.0 ** -14, 2.0 ** -56 * (1 - 1.5 * 2.0 ** -13)
# values that a CPU rounds at a time: what it computes in between stays in its cache
_PIECE = 1 << 18


def stochastic_round(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` in `dtype`, without bias for bfloat16 and float16; as `to` has it for all others,
    and the gradient for all.

    values: float32, any shape; may be overwritten. Infinities and NaN stay what they are; what is
    larger than the largest finite number of `dtype` is rounded to the nearest.
    """
    if dtype not in _DROPPED_BITS or values.dtype != torch.float32:
        return values.to(dtype)
    return (
        _StochasticRound.apply(values, dtype) if values.requires_grad else _by_bits(values, dtype)
    )


class _StochasticRound(torch.autograd.Function):
    """Bits have no gradient: it is that of a cast."""

    @staticmethod
    def forward(ctx, values, dtype):
        return _by_bits(values, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float(), None


def stochastic_round_to_integers(values: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Whole numbers of steps for values, without bias. values, step: float32, of shapes that go
    together. Returns float32."""
    steps = values / step
    lower = steps.floor()
    chance = _upper(_hash(values), _CHANCE_BITS)
    return lower.add_(steps.sub_(lower) * (1 << _CHANCE_BITS) > chance)


def _hash(values: torch.Tensor) -> torch.Tensor:
    """A number in int32 for the bits of each float32."""
    return values.view(torch.int32).mul(_MIX)


def _upper(hashes: torch.Tensor, count: int) -> torch.Tensor:
    """Their upper bits, as a number from 0 to 2^count - 1, in place."""
    return hashes.bitwise_right_shift_(32 - count).bitwise_and_((1 << count) - 1)


def _by_bits(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(values, dtype=dtype)
    pieces = [(values, out)]
    if (
        values.device.type == "cpu"
        and values.is_contiguous()
        and out.is_contiguous()
        and not torch.compiler.is_compiling()
    ):
        pieces = zip(values.view(-1).split(_PIECE), out.view(-1).split(_PIECE))
    for piece, rounded in pieces:
        rounded.copy_(_on_the_grid(piece, dtype))
    return out


def _on_the_grid(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values that a cast to `dtype` rounds to what `stochastic_round` gives."""
    dropped, largest = _DROPPED_BITS[dtype], torch.finfo(dtype).max
    normal = values.clamp(-largest, largest)
    if dtype == torch.float16:
        normal = torch.nn.functional.hardshrink(normal, _LEAST_NORMAL)  # zero for what is not
    less = normal - values  # zero where the value is normal and finite, NaN for NaN
    hashes = _hash(values)
    if dtype == torch.float16:
        less.sub_(hashes, alpha=_NOISE)
    bits = _upper(hashes, dropped).add_(normal.view(torch.int32)).bitwise_and_(-1 << dropped)
    return bits.view(torch.float32).sub_(less)


def add_small(value: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`value + change` in the dtype of `value`, where the change may be far below a step of the
    value."""
    if value.dtype.itemsize > 2:
        return value + change
    return stochastic_round(value.float() + change, value.dtype)
