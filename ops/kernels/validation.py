"""Kernels against the torch reference, on the device that is to run them.

A kernel is run in each of its cases below, so that each branch that a layer may meet in it has run
here: whole weights and a few values, the beginning and the end of a range of rows, the work of one
thread and of several, loads from and stores to even and odd addresses, with an addend and without.
Not checked: weights of 2**31 values and more.
"""
import itertools
import logging
import math
import platform
from dataclasses import dataclass

import torch

from .. import int8_codes
from ..format import FORMATS, Format
from . import quantize_validation
from .kernel import WrongResult, device_name

log = logging.getLogger(__name__)

ISSUES = "https://github.com/featherweight/ComfyUI-Featherweight/issues"
# values: MANY are several threads' work on a CPU, and that of many programs on a GPU
FEW, MANY = 1, 3 << 16
NARROW, WIDE = 96, 1280  # columns, at least: several tiles of a kernel's and a part of one are WIDE
ROWS = 13  # at least, of a weight: no multiple of what a kernel handles together
MAX_TOKENS = 33  # of a kernel that takes any number
MAX_ABS = 64.0  # blocks with larger values say little about a sum in float16
# of a code: how near the middle between two codes another rounding may give the other
NEAR_TIE = 0.01
SUBNORMAL = 16 * torch.finfo(torch.float32).tiny
CANARY = 7.0  # stands beside what a kernel may write


@dataclass(frozen=True)
class Dequantize:
    """Blocks of the weight, the first to dequantise, how many values of the last one not to.
    packed_at, out_at: how many elements behind an aligned address the weight's tensors and the
    values lie."""
    blocks: int
    first: int = 0
    left_out: int = 0
    packed_at: int = 0
    out_at: int = 0


@dataclass(frozen=True)
class Linear:
    """values, columns: of the weight, at least. addend: "none", "bias" or "matrix", whose strides
    are odd. packed_at, input_at: as in `Dequantize`."""
    tokens: int
    values: int
    columns: int
    addend: str
    packed_at: int = 0
    input_at: int = 0


@dataclass(frozen=True)
class Int8Rows:
    """values, columns: of the weight, at least; first: of the rows to code. packed_at: as in
    `Dequantize`."""
    values: int
    columns: int
    first: int = 0
    packed_at: int = 0


@dataclass(frozen=True)
class Int8Tokens:
    """The input's shape, and how many elements behind an aligned address it lies."""
    tokens: int
    columns: int
    input_at: int = 0


def cases_of(kernel, packed_format: type[Format] | None) -> list:
    """What to check of a kernel, small cases first."""
    if kernel.capability == "dequantize":
        length = packed_format.block_length
        many = -(-MANY // length) + 3
        return [
            Dequantize(5, 3, 0, 1, 1),
            Dequantize(5, 1, 8 % length, 2),
            Dequantize(5, 2, 16 % length, 4),
            Dequantize(5, 0, 3 % length, 0, 1),
            Dequantize(many),
            Dequantize(many, 1, 8 % length, 1)
        ]
    if kernel.capability == "linear":
        ends = sorted({kernel.min_tokens, kernel.max_tokens or MAX_TOKENS})
        few = itertools.product(ends, (("none", 0), ("matrix", 1)))
        many = itertools.product(ends, (("none", 0), ("bias", 0), ("matrix", 4)))
        return [
            *(Linear(tokens, FEW, NARROW, addend, 1, input_at)
              for tokens, (addend, input_at) in few),
            *(Linear(tokens, MANY, WIDE, addend, packed_at) for tokens, (addend, packed_at) in many)
        ]
    if kernel.capability == "int8_rows":
        return [Int8Rows(FEW, NARROW, 1), Int8Rows(FEW, NARROW, 2, 1), Int8Rows(MANY, WIDE, 0, 4)]
    if kernel.capability in quantize_validation.CASES:
        return quantize_validation.CASES[kernel.capability](packed_format.grid)
    return [
        Int8Tokens(1, NARROW),
        Int8Tokens(7, 3 * int8_codes.GROUP, 1),
        Int8Tokens(MANY // WIDE, WIDE)
    ]


def check(kernel, packed_format: type[Format] | None, dtype: torch.dtype,
          value_dtype: torch.dtype | None, device: torch.device):
    """Raises WrongResult, or whatever the kernel raises, unless it gives the reference's results in
    all its cases."""
    check_case = {
        "dequantize": _check_dequantize, "linear": _check_linear, "int8_rows": _check_int8_rows,
        "int8_tokens": _check_int8_tokens, "pack_blocks": quantize_validation.check_blocks,
        "pack_columns": quantize_validation.check_columns
    }[kernel.capability]
    for case in cases_of(kernel, packed_format):
        try:
            check_case(kernel.run, case, packed_format, dtype, value_dtype, device)
        except WrongResult as error:
            raise WrongResult(f"{error} in the case {case}") from None


def report_wrong(case: str, device: torch.device, error):
    """Wrong values are our fault, and only who has that device can tell us of them."""
    log.warning("[Featherweight] A kernel gives wrong values here (%s on %s, torch %s, %s: %s), so "
                "torch does its work, slower; please report this line at %s.", case,
                device_name(device), torch.__version__,
                f"{platform.system()} {platform.release()}", error, ISSUES)


def probe(dequantize, device: torch.device):
    """Dequantises one block. dequantise: as `Kernel.run`. Raises WrongResult, or whatever it
    raises, where that fails."""
    packed_format = FORMATS["Q8_0"]
    block = torch.zeros(packed_format.block_bytes, dtype=torch.uint8, device=device)
    out = torch.full((packed_format.block_length,), torch.nan, dtype=torch.float32, device=device)
    dequantize(packed_format, [block], out, None, 0)
    if out.any():
        raise WrongResult("a block of zeros was dequantised to something else")


def _check_dequantize(run, case, packed_format, dtype, value_dtype, device):
    tensors = random_tensors(packed_format, case.blocks, device)
    held = case.blocks * packed_format.block_length - case.left_out
    count = held - case.first * packed_format.block_length
    # its last block may be short
    if any(base.__name__ == "Codebook4Bit" for base in packed_format.__mro__):
        tensors[0] = tensors[0][:-(-held // 2)]
    expected = packed_format.dequantize_into(tensors, torch.empty(count, dtype=dtype,
                                                                  device=device), value_dtype,
                                             case.first)
    around = torch.full((count + 32 + case.out_at,), CANARY, dtype=dtype, device=device)
    got = around[16 + case.out_at:][:count]
    run(packed_format, [misaligned_copy(tensor, case.packed_at) for tensor in tensors], got,
        value_dtype, case.first)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    wrong = ((got.view(bits) != expected.view(bits)) &
             ~(got.isnan() & expected.isnan())).sum().item()
    if wrong:
        raise WrongResult(f"{wrong} of {count} values differ from the reference")
    if (around[: 16 + case.out_at] != CANARY).any() or (
        around[16 + case.out_at + count :] != CANARY
    ).any():
        raise WrongResult("something was written beside the values")


def _check_linear(run, case, packed_format, dtype, value_dtype, device):
    rows, columns = _shape(case, packed_format.block_length)
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, device,
                             calm=True)
    generator = torch.Generator().manual_seed(case.tokens)
    input = torch.randn((case.tokens, columns), generator=generator,
                        dtype=torch.float32).to(device, dtype)
    addend = None
    if case.addend == "bias":
        addend = torch.randn(rows, generator=generator,
                             dtype=torch.float32).to(device, dtype).expand(case.tokens, rows)
    elif case.addend == "matrix":
        addend = torch.randn((rows, case.tokens), generator=generator,
                             dtype=torch.float32).to(device, dtype).t()
    got = torch.full((case.tokens, rows), torch.nan, dtype=dtype, device=device)
    packed = [misaligned_copy(tensor, case.packed_at) for tensor in tensors]
    run(packed_format, packed, misaligned_copy(input, case.input_at), addend, got, value_dtype)
    weight = packed_format.dequantize_into(tensors,
                                           input.new_empty((rows, columns), dtype=torch.float32),
                                           value_dtype)
    error = _product_error(input, weight, addend, got)
    if not error <= 1:  # NaN too
        error = min(error, _product_error(input, weight.to(dtype), addend, got))
    if not error <= 1:
        raise WrongResult(f"a product is off by {error:.3g} times what rounding allows")


def _check_int8_rows(run, case, packed_format, dtype, value_dtype, device):
    rows, columns = _shape(case, math.lcm(packed_format.block_length, int8_codes.GROUP))
    first = case.first * columns // packed_format.block_length
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, device,
                             calm=True)
    values = torch.empty((rows - case.first, columns), dtype=torch.float32, device=device)
    packed_format.dequantize_into(tensors, values, value_dtype, first)
    packed = [misaligned_copy(tensor, case.packed_at) for tensor in tensors]
    _check_codes(values, lambda *out: run(packed_format, packed, *out, value_dtype, first))


def _check_int8_tokens(run, case, packed_format, dtype, value_dtype, device):
    columns = -(-case.columns // int8_codes.GROUP) * int8_codes.GROUP
    generator = torch.Generator().manual_seed(case.tokens)
    input = torch.randn((case.tokens, columns), generator=generator,
                        dtype=torch.float32).to(device, dtype)
    input[:, 5] *= 50
    if case.tokens > 3:
        input[1], input[2, -3], input[3, -3] = 0, torch.nan, torch.inf
    input = misaligned_copy(input, case.input_at)
    _check_codes(input.float(), lambda *out: run(input, *out))


def _check_codes(values, encode):
    """encode(codes, scales): writes those of the rows of `values @ R`, which are made in float64 on
    the CPU: the device may be set to round what it multiplies in float32."""
    codes = torch.full(values.shape, -128, dtype=torch.int8, device=values.device)
    scales = torch.full((len(values),), -1.0, dtype=torch.float32, device=values.device)
    encode(codes, scales)
    codes, scales = codes.cpu(), scales.cpu()
    expected = torch.empty_like(scales)
    rows = int8_codes.rotate(values.cpu().double())
    int8_codes.quantize_into(rows.float(), torch.empty_like(codes), expected)
    wrong = (~torch.isclose(scales, expected, rtol=1e-5, atol=0,
                            equal_nan=True)).nonzero().flatten().tolist()
    if wrong:
        raise WrongResult(
            f"{len(wrong)} scales of {len(scales)} differ, that of row {wrong[0]} is"
            f" {scales[wrong[0]].item():g} and should be {expected[wrong[0]].item():g}")
    known = expected.isfinite()
    off = (codes.double() - rows / scales.unsqueeze(-1)).abs()[known].max().item()
    if not off <= 0.5 + NEAR_TIE:
        raise WrongResult(
            f"a code is {off:.3g} from its value, where rounding allows {0.5 + NEAR_TIE},")


def _shape(case, multiple: int) -> tuple[int, int]:
    """Rows and columns of a weight, the columns a multiple of `multiple`."""
    columns = -(-case.columns // multiple) * multiple
    return max(ROWS, case.values // columns), columns


def _product_error(input, weight, addend, got) -> float:
    """The largest error of `got`, where 1 is what a sum in float32, rounded once, may have."""
    eps = torch.finfo(got.dtype).eps
    least = max(eps * torch.finfo(got.dtype).tiny, SUBNORMAL)  # between two numbers near zero
    addend = got.new_zeros(()) if addend is None else addend
    # MPS has no float64
    input, weight, addend, got = (tensor.cpu().double() for tensor in (input, weight, addend, got))
    expected = input @ weight.t() + addend
    allowed = eps * expected.abs() + 1e-5 * (input.abs() @ weight.abs().t() + addend.abs()) + least
    return ((got - expected).abs() / allowed).max().item()


def misaligned_copy(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The same values, `elements` elements behind an address that 64 divides."""
    if not elements:
        return tensor
    out = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
    return out.copy_(tensor)


def random_tensors(packed_format: type[Format], blocks: int, device: torch.device,
                   calm: bool = False) -> list[torch.Tensor]:
    """What a weight of random blocks holds. calm: only blocks of finite values up to `MAX_ABS`."""
    generator = torch.Generator().manual_seed(blocks)
    if packed_format.scales_apart:
        data = torch.randint(0, 256, (blocks * packed_format.block_bytes,), generator=generator,
                             dtype=torch.uint8)
        return [
            data.to(device),
            torch.rand(blocks, generator=generator, dtype=torch.float32).to(device)
        ]
    pool = torch.randint(0, 256, (1024 if calm else blocks + 16, packed_format.block_bytes),
                         generator=generator, dtype=torch.uint8)
    values = packed_format.dequantize(pool).abs()
    if calm:
        pool = pool[values.amax(-1) <= MAX_ABS]  # NaN compares false
    else:  # nothing that one device takes for zero and another does not; this one may have done so already
        pool = pool[~((values > 0) & (values < SUBNORMAL)).any(-1) & (values != 0).any(-1)]
    return [pool[torch.arange(blocks) % len(pool)].to(device)]
