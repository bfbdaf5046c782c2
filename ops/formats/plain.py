"""Plain 16-bit numbers, for the layers of a packed model that its file did not quantise.

Such a weight stays as in its file, also where the model computes in float32, and is cast while its
layer runs, as packed formats are dequantised.
"""
import torch

from .base import Format

VALUES_AT_ONCE = 1 << 17  # half a megabyte of float32 stays in a core's cache


class _Plain(Format):
    """One value of `plain_dtype` a block."""

    block_length = 1
    plain_dtype: torch.dtype

    def dequantize(self, blocks):
        return blocks.contiguous().view(self.plain_dtype).float()

    def pack(self, values):
        return values.to(self.plain_dtype).view(torch.uint8)

    def dequantize_into(self, tensors, out, first=0):
        values = tensors[0].view(-1).view(self.plain_dtype)[first:first + out.numel()]
        flat_out = out.view(-1)
        if out.device.type != "cpu" or out.dtype in (torch.float32, values.dtype):
            flat_out.copy_(values)
            return out
        # between two types of 16 bits a CPU converts one number at a time, by way of float32 many
        buffer = torch.empty(min(len(values), VALUES_AT_ONCE), dtype=torch.float32)
        for start in range(0, len(values), VALUES_AT_ONCE):
            part = values[start:start + VALUES_AT_ONCE]
            flat_out[start:start + len(part)].copy_(buffer[:len(part)].copy_(part))
        return out


class F16(_Plain):
    """IEEE half precision, two bytes a value."""

    block_bytes, plain_dtype = 2, torch.float16


class BF16(_Plain):
    """bfloat16, two bytes a value."""

    block_bytes, plain_dtype = 2, torch.bfloat16


PLAIN_FORMATS = {each.plain_dtype: each for each in (F16.of(), BF16.of())}
