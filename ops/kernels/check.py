"""Kernels against the torch reference, on the device that is to run them."""
import math

import torch

from .. import int8_codes
from ..format import FORMATS, Format

BLOCKS = 24
ROWS = 12
CALM = 64.0  # blocks with larger values say little about a sum in float16
NEAR_TIE = 0.01  # of a code: how near the middle between two codes another rounding may give the other


def probe(unpack, device: torch.device):
    """Unpacks one block. unpack: as `Kernel.run`. Raises ArithmeticError, or whatever it raises, where that fails."""
    packed_format = FORMATS["Q8_0"]
    block = torch.zeros(packed_format.block_bytes, dtype=torch.uint8, device=device)
    out = torch.full((packed_format.block_length,), torch.nan, device=device)
    unpack(packed_format, [block], out, None, 0)
    if out.any():
        raise ArithmeticError("a block of zeros was unpacked to something else")


def check(kernel, packed_format: type[Format] | None, dtype: torch.dtype, value_dtype: torch.dtype | None,
          device: torch.device):
    """Raises ArithmeticError, or whatever the kernel raises, unless it gives the reference's results on random blocks."""
    if kernel.op == "unpack":
        _check_unpack(kernel, packed_format, dtype, value_dtype, device)
    elif kernel.op == "int8_rows":
        _check_int8_rows(kernel, packed_format, value_dtype, device)
    elif kernel.op == "int8_tokens":
        _check_int8_tokens(kernel, dtype, device)
    else:
        for tokens in sorted({kernel.min_tokens, kernel.max_tokens or kernel.min_tokens}):
            _check_linear(kernel, packed_format, dtype, value_dtype, device, tokens)


def _check_unpack(kernel, packed_format, dtype, value_dtype, device):
    tensors = random_tensors(packed_format, BLOCKS, device)
    first = 3
    got, expected = torch.empty((2, (BLOCKS - first) * packed_format.block_length), dtype=dtype, device=device)
    kernel.run(packed_format, tensors, got, value_dtype, first)
    packed_format.unpack_into(tensors, expected, value_dtype, first)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    wrong = ((got.view(bits) != expected.view(bits)) & ~(got.isnan() & expected.isnan())).sum().item()
    if wrong:
        raise ArithmeticError(f"{wrong} of {len(got)} values differ from the reference")


def _check_linear(kernel, packed_format, dtype, value_dtype, device, tokens):
    per_row = max(1, BLOCKS // ROWS)
    tensors = random_tensors(packed_format, ROWS * per_row, device, calm=True)
    columns = per_row * packed_format.block_length
    generator = torch.Generator().manual_seed(tokens)
    input = torch.randn((tokens, columns), generator=generator).to(device, dtype)
    addend = torch.randn(ROWS, generator=generator).to(device, dtype).expand(tokens, ROWS)
    got = input.new_empty((tokens, ROWS))
    kernel.run(packed_format, tensors, input, addend, got, value_dtype)
    weight = packed_format.unpack_into(tensors, input.new_empty((ROWS, columns), dtype=torch.float32), value_dtype)
    error = min(_product_error(input, values, addend, got) for values in (weight, weight.to(dtype)))
    if not error <= 1:  # NaN too
        raise ArithmeticError(f"the product of {tokens} rows is off by {error:.3g} times what rounding allows")


def _check_int8_rows(kernel, packed_format, value_dtype, device):
    columns = math.lcm(packed_format.block_length, 2 * int8_codes.GROUP)
    per_row, skipped = columns // packed_format.block_length, 1
    tensors = random_tensors(packed_format, ROWS * per_row, device, calm=True)
    values = torch.empty((ROWS - skipped, columns), device=device)
    packed_format.unpack_into(tensors, values, value_dtype, skipped * per_row)
    _check_codes(values, lambda *out: kernel.run(packed_format, tensors, *out, value_dtype, skipped * per_row))


def _check_int8_tokens(kernel, dtype, device):
    for tokens in (1, 7):
        input = torch.randn((tokens, 3 * int8_codes.GROUP), generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
        input[:, 5] *= 50
        if tokens > 1:
            input[1], input[2, 300], input[3, 300] = 0, torch.nan, torch.inf
        _check_codes(input.float(), lambda *out, input=input: kernel.run(input, *out))


def _check_codes(values, encode):
    """encode(codes, scales): writes those of the rows of `values @ R`."""
    codes = torch.full(values.shape, -128, dtype=torch.int8, device=values.device)
    scales = torch.full((len(values),), -1.0, device=values.device)
    encode(codes, scales)
    expected_codes, expected = torch.empty_like(codes), torch.empty_like(scales)
    rows = int8_codes.rotated(values)
    int8_codes.quantise_into(rows.clone(), expected_codes, expected)
    if not torch.allclose(scales, expected, rtol=1e-5, atol=0, equal_nan=True):
        raise ArithmeticError(f"the scales of rows are {scales.tolist()}, expected {expected.tolist()}")
    known = expected.isfinite()
    off = (codes.float() - rows / scales.unsqueeze(-1)).abs()[known].max().item()
    if not off <= 0.5 + NEAR_TIE:
        raise ArithmeticError(f"a code is {off:.3g} from its value, where rounding allows {0.5 + NEAR_TIE}")


def _product_error(input, weight, addend, got) -> float:
    """The largest error of `got`, where 1 is what a sum in float32, rounded once, may have."""
    eps = torch.finfo(got.dtype).eps
    input, weight, addend, got = (tensor.cpu().double() for tensor in (input, weight, addend, got))  # MPS has no float64
    expected = input @ weight.t() + addend
    allowed = eps * expected.abs() + 1e-5 * (input.abs() @ weight.abs().t() + addend.abs())
    return ((got - expected).abs() / allowed).max().item()


def random_tensors(packed_format: type[Format], blocks: int, device: torch.device, calm: bool = False) -> list[torch.Tensor]:
    """What a weight of random blocks holds. calm: only blocks of finite values up to `CALM`."""
    pool = 1024 if calm else blocks
    generator = torch.Generator().manual_seed(blocks)
    data = torch.randint(0, 256, (pool, packed_format.block_bytes), generator=generator, dtype=torch.uint8)
    if packed_format.scales_apart:
        scales = torch.rand(blocks, generator=generator)
        return [data[:blocks].flatten().to(device), scales.to(device)]
    if calm:
        data = data[packed_format.unpack(data).abs().amax(-1) <= CALM]  # NaN compares false
        data = data[torch.arange(blocks) % len(data)]
    return [data.to(device)]
