"""The format of kernels whose codes are stored with the positions of the kernel outermost."""
import torch

from .base import Format
from .low_rank_and_joined import Composite, DequantizeInto, in_float


class TapsFirst(Composite):
    """value[channel, tap] = value of `base`[tap, channel], in float32.

    A row is the values of one output channel of a convolution: input channels, and for each its
    taps. In a row of `base` the channels are neighbours, so that groups of them are rotated. The
    tensors are those of `base`.

    Attributes:
        base: whose block is a row.
        taps: positions of the kernel.
    """

    def __init__(self, base: Format, taps: int):
        self.name, self.base, self.taps = f"TAPS_{taps}_{base.name}", base, taps
        self.block_length, self.block_bytes = base.block_length, base.block_bytes
        self.qparams, self.is_host_format = base.qparams, base.is_host_format

    def title(self) -> str:
        return self.base.title()

    def dequantize_parts(self, tensors: list[torch.Tensor], out: torch.Tensor, first: int,
                         dequantize_into: DequantizeInto) -> torch.Tensor:

        def dequantize(values: torch.Tensor, row: int):
            by_tap = dequantize_into(self.base, tensors, torch.empty_like(values), row)
            shape = len(values), self.taps, self.block_length // self.taps
            values.view(shape[0], shape[2], shape[1]).copy_(by_tap.view(shape).transpose(1, 2))

        return in_float(out.view(-1, self.block_length), first, dequantize, out)
