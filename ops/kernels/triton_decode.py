"""Decodes each format's bytes in Triton: one function per format, shared by every kernel.

A weight is seen as groups of neighbouring values that share their scales. A decoder returns the
values of some groups, float32 (G, L):

    decode(data, size, scales, table, group, lane, BLOCK_LENGTH)

    data: The packed bytes, at an address that is a multiple of 4.
    size: Their number.
    scales: float32, of formats whose scales are a second tensor.
    table: The codebook, of formats that have one.
    group: int64 (G, 1), counted from the start of the weight.
    lane: int32 (1, L), 0 to L - 1, the positions in a group.

It computes in the order of operations of the class in `ops/formats`, which documents the byte
layout. What depends on the group alone is loaded once per group.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..formats.base import Format


@dataclass(frozen=True)
class Decoder:
    """A format's decoder.

    Attributes:
        function: The jitted function.
        group: Values in a group.
        table: (format, device) -> the codebook; None for formats without one.
        stages: How many iterations of a product's loop have their loads in shared memory at once;
            None: Triton's default.
    """
    function: Callable
    group: int
    table: Callable[[Format, torch.device], torch.Tensor] | None
    stages: int | None


DECODERS: dict[str, Decoder] = {}


def _decodes(*formats: str, group: int,
             table: Callable[[Format, torch.device], torch.Tensor] | None = None,
             stages: int | None = None):
    """Decorator that registers a function as the decoder of `formats`; see `Decoder`."""
    def register(function):
        DECODERS.update(dict.fromkeys(formats, Decoder(function, group, table, stages)))
        return function
    return register


@triton.jit
def _half(address):
    """Returns the float16 at an even address, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True)).to(tl.float32)


@triton.jit
def _bits(address, shift, mask):
    """Returns the bits of a byte from `shift` on, as int32."""
    return tl.load(address).to(tl.int32) >> shift & mask


@triton.jit
def _signed(address):
    """Returns the int8 at an address, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.int8), bitcast=True)).to(tl.float32)


@_decodes("Q4_0", group=32)
@triton.jit
def _q4_0(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 18
    return (_bits(block + 2 + lane % 16, lane // 16 * 4, 15) - 8).to(tl.float32) * _half(block)


@_decodes("Q4_1", group=32)
@triton.jit
def _q4_1(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 20
    code = _bits(block + 4 + lane % 16, lane // 16 * 4, 15)
    return code.to(tl.float32) * _half(block) + _half(block + 2)


@triton.jit
def _five_bits(high, low, lane):
    """Returns int32 codes: the bits at `high`, an even address, above the nibbles at `low`."""
    words = high.to(tl.pointer_type(tl.uint16), bitcast=True)
    fifth = tl.load(words).to(tl.int32) | tl.load(words + 1).to(tl.int32) << 16
    return _bits(low + lane % 16, lane // 16 * 4, 15) | (fifth >> lane & 1) << 4


@_decodes("Q5_0", group=32)
@triton.jit
def _q5_0(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 22
    return (_five_bits(block + 2, block + 6, lane) - 16).to(tl.float32) * _half(block)


@_decodes("Q5_1", group=32)
@triton.jit
def _q5_1(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 24
    code = _five_bits(block + 4, block + 8, lane)
    return code.to(tl.float32) * _half(block) + _half(block + 2)


@_decodes("Q8_0", group=32)
@triton.jit
def _q8_0(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 34
    return _signed(block + 2 + lane) * _half(block)


@triton.jit
def _two_bits(codes, part, lane):
    """Returns the int32 codes of part 0..15 of a block with 64 bytes of four values at `codes`."""
    return _bits(codes + part // 8 * 32 + part % 2 * 16 + lane, part % 8 // 2 * 2, 3)


@_decodes("Q2_K", group=16)
@triton.jit
def _q2_k(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 16 * 84, (group % 16).to(tl.int32)
    scale = _bits(block + part, 0, 15).to(tl.float32) * _half(block + 80)
    minimum = _bits(block + part, 4, 15).to(tl.float32) * _half(block + 82)
    return _two_bits(block + 16, part, lane).to(tl.float32) * scale - minimum


@_decodes("Q3_K", group=16)
@triton.jit
def _q3_k(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 16 * 110, (group % 16).to(tl.int32)
    low = _bits(block + 96 + part % 8, part // 8 * 4, 15)
    scale = low | _bits(block + 104 + part % 4, part // 4 * 2, 3) << 4
    third = _bits(block + part % 2 * 16 + lane, part // 2, 1)
    code = _two_bits(block + 32, part, lane) | third << 2
    return (code - 4).to(tl.float32) * ((scale - 32).to(tl.float32) * _half(block + 108))


@triton.jit
def _scale_and_min(block, part):
    """Returns d * scale and dmin * min of part 0..7 of a block of Q4_K or Q5_K, see
    `k_quants._scales_and_mins`."""
    first, third = block + 4 + part % 4, block + 12 + part % 4
    second = first + 4
    low = part < 4
    scale = tl.where(low, _bits(first, 0, 63), _bits(third, 0, 15) | _bits(first, 6, 3) << 4)
    minimum = tl.where(low, _bits(second, 0, 63), _bits(third, 4, 15) | _bits(second, 6, 3) << 4)
    return scale.to(tl.float32) * _half(block), minimum.to(tl.float32) * _half(block + 2)


@_decodes("Q4_K", group=32)
@triton.jit
def _q4_k(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 8 * 144, (group % 8).to(tl.int32)
    scale, minimum = _scale_and_min(block, part)
    code = _bits(block + 16 + part // 2 * 32 + lane, part % 2 * 4, 15)
    return code.to(tl.float32) * scale - minimum


@_decodes("Q5_K", group=32)
@triton.jit
def _q5_k(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 8 * 176, (group % 8).to(tl.int32)
    scale, minimum = _scale_and_min(block, part)
    low = _bits(block + 48 + part // 2 * 32 + lane, part % 2 * 4, 15)
    code = low | _bits(block + 16 + lane, part, 1) << 4
    return code.to(tl.float32) * scale - minimum


@_decodes("Q6_K", group=16)
@triton.jit
def _q6_k(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 16 * 210, (group % 16).to(tl.int32)
    low = _bits(block + part // 8 * 64 + part % 4 * 16 + lane, part % 8 // 4 * 4, 15)
    high = _bits(block + 128 + part // 8 * 32 + part % 2 * 16 + lane, part % 8 // 2 * 2, 3)
    scale = _signed(block + 192 + part) * _half(block + 208)
    return ((low | high << 4) - 32).to(tl.float32) * scale


def _nibble_values(packed_format, device) -> torch.Tensor:
    """Returns int8: the value of code c at 2 c."""
    return packed_format.constant("value_pairs", device).view(torch.int8)


@_decodes("IQ4_NL", group=32, table=_nibble_values)
@triton.jit
def _iq4_nl(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 18
    code = _bits(block + 2 + lane % 16, lane // 16 * 4, 15)
    return tl.load(table + code * 2).to(tl.float32) * _half(block)


@_decodes("IQ4_XS", group=32, table=_nibble_values)
@triton.jit
def _iq4_xs(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block, part = data + group // 8 * 136, (group % 8).to(tl.int32)
    low = _bits(block + 4 + part // 2, part % 2 * 4, 15)
    scale = low | _bits(block + 2 + part // 4, part % 4 * 2, 3) << 4
    code = _bits(block + 8 + part * 16 + lane % 16, lane // 16 * 4, 15)
    return tl.load(table + code * 2).to(tl.float32) * ((scale - 32).to(tl.float32) * _half(block))


@_decodes("MXFP4", group=32, table=_nibble_values)
@triton.jit
def _mxfp4(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    block = data + group * 17
    exponent = tl.load(block).to(tl.int32)
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), exponent - 1 << 23)
    scale = bits.to(tl.float32, bitcast=True)
    code = _bits(block + 1 + lane % 16, lane // 16 * 4, 15)
    return tl.load(table + code * 2).to(tl.float32) * scale


def _codebook(packed_format, device) -> torch.Tensor:
    """Returns float32: the value of code c at 2 c + 1."""
    return packed_format.constant("code_pairs", device).view(torch.float32)


@_decodes("NF4", "FP4", group=32, table=_codebook, stages=2)
@triton.jit
def _codebook_4bit(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    byte = group * 16 + tl.arange(0, 16)[None, :]  # the last group may be short
    pair = tl.load(data + byte, mask=byte < size, other=0).to(tl.int32)
    code = tl.interleave(pair >> 4, pair & 15)
    return tl.load(table + code * 2 + 1) * tl.load(scales + group * 32 // BLOCK_LENGTH)


@_decodes("INT8", group=32)
@triton.jit
def _int8(data, size, scales, table, group, lane, BLOCK_LENGTH: tl.constexpr):
    return _signed(data + group * 32 + lane) * tl.load(scales + group * 32 // BLOCK_LENGTH)
