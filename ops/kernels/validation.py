"""Validates kernels against the torch reference, on the device that is to run them.

A kernel runs in each of the cases below, so that every branch that a layer may reach in it has run
here: whole weights and a few values, the start and the end of a range of rows, the work of one
thread and of several, loads from and stores to even and odd addresses, with and without an addend.
Weights of 2**31 values and more are not checked.
"""
import itertools
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import stochastic_rounding
from ..formats._names import formats_of_key
from ..formats.base import FORMATS, Format, QParam
from ..formats.row_layout import NUMBER_DTYPES, RowFormat
from ..log import log
from . import int8_codes, quantize_validation
from .kernel import PITCHED_MULTIPLE, Kernel, WrongResult, device_name

ISSUES = "https://github.com/featherweight/ComfyUI-Featherweight/issues"
# Values of a weight. MANY keep several threads busy on a CPU, and many programs on a GPU.
FEW, MANY = 1, 3 << 16
# Columns, at least. WIDE is several of a kernel's tiles and a part of one.
NARROW, WIDE = 96, 1280
LONG = (1 << 14) + 1  # of a row whose values a GPU's registers do not hold
ROWS = 13  # of a weight, at least: no multiple of what a kernel handles together
MAX_TOKENS = 33  # for a kernel that takes any number
TILE_TOKENS = 6  # a kernel may have a way of its own for each number of tokens up to this one
MAX_ABS = 64.0  # blocks with larger values say little about a sum in float16
NEAR_TIE = 0.01  # so close to the middle between two codes, another rounding may give the other one
SUBNORMAL = 16 * torch.finfo(torch.float32).tiny
MAX_CODE = 128.0  # in magnitude, of the codes of a row whose product is checked
# storage of floats in bytes -> the first byte, and that behind the last, of any magnitude
# and of small ones
EXPONENTS = {"e4m3": ((64, 127), (32, 64)), "e8m0": ((64, 127), (119, 127))}
ATTENTION_ERROR = 3e-5  # of the shares: scores of up to 100 are rounded, and so are powers
CANARY = 7.0  # surrounds the memory that a kernel may write


def cases_of(kernel: Kernel, packed_format: Format | None) -> list[dict[str, Any]]:
    """Returns the cases in which a kernel is checked, small ones first: the last arguments of its
    check."""
    if kernel.capability == "int8_tokens":
        return [
            {"rows": 1, "columns": NARROW},
            {"rows": 7, "columns": 3 * int8_codes.GROUP, "offset": 1},
            {"rows": MANY // WIDE, "columns": WIDE},
        ]
    if kernel.capability == "channels_last":
        sizes = (((3, 4, 9), 1, 1), ((1, 67, 1), 1, 0), ((2, 45, 25), 0, 0), ((2, 5, 100), 0, 0),
                 ((MANY // (NARROW * 9), NARROW, 9), 0, 0))
        return [{"source": source, "shape": shape, "packed_offset": packed_offset,
                 "out_offset": out_offset} for shape, packed_offset, out_offset in sizes
                for source in (torch.float32, torch.float16, torch.bfloat16)]
    if kernel.capability == "add_rounded":
        return [{"rows": 1, "columns": 1}, {"rows": 3, "columns": 37, "offset": 1},
                {"rows": 8, "columns": 512, "offset": 8}, {"rows": MANY // WIDE, "columns": WIDE}]
    if kernel.capability == "attention":
        return [
            {"sizes": (1, 1, 1, 1, 1, 1, 1), "offset": 1},
            {"sizes": (2, 1, 1, 5, 7, 9, 17), "masked": "keys", "offset": 1},
            {"sizes": (2, 6, 2, 13, 77, 40, 40), "masked": "scores"},
            {"sizes": (1, 2, 2, 101, 130, 128, 128), "offset": 1},  # several blocks of queries
            {"sizes": (1, 1, 1, 19, 1093, 80, 72), "masked": "scores"},  # several chunks of keys
            {"sizes": (1, 2, 2, 21, 600, 512, 512)},
        ]
    assert packed_format is not None
    if kernel.capability == "dequantize":
        length = packed_format.block_length
        many = -(-MANY // length) + 3
        return [
            {"blocks": 5, "first": 3, "packed_offset": 1, "out_offset": 1},
            {"blocks": 5, "first": 1, "omitted": 8 % length, "packed_offset": 2},
            {"blocks": 5, "first": 2, "omitted": 16 % length, "packed_offset": 4},
            {"blocks": 5, "omitted": 3 % length, "out_offset": 1},
            {"blocks": many},
            {"blocks": many, "first": 1, "omitted": 8 % length, "packed_offset": 1},
            *(_pitched_cases(packed_format) if kernel.takes_pitch else []),
        ]
    if kernel.capability == "linear":
        limits = sorted({kernel.min_tokens, kernel.max_tokens or MAX_TOKENS})
        last = min(kernel.min_tokens + TILE_TOKENS - 1, kernel.max_tokens or MAX_TOKENS)
        few = itertools.product(range(kernel.min_tokens, last + 1), (("none", 0), ("matrix", 1)))
        many = itertools.product(limits, (("none", 0), ("bias", 0), ("matrix", 4)))
        small = [{"tokens": tokens, "values": FEW, "columns": NARROW, "added": added,
                  "packed_offset": 1, "input_offset": input_offset}
                 for tokens, (added, input_offset) in few]
        large = [
            *({"tokens": tokens, "values": MANY, "columns": WIDE, "added": added,
               "packed_offset": packed_offset} for tokens, (added, packed_offset) in many),
            *({"tokens": tokens, "values": 4 * MANY, "columns": 2 * WIDE} for tokens in limits),
        ]
        if not isinstance(packed_format, RowFormat):
            return small + large
        return large if packed_format.block_length >= WIDE else small
    if kernel.capability == "int8_rows":
        return [
            {"values": FEW, "columns": NARROW, "first": 1},
            {"values": FEW, "columns": NARROW, "first": 2, "packed_offset": 1},
            {"values": MANY, "columns": WIDE, "packed_offset": 4},
            {"values": FEW, "columns": LONG}
        ]
    return quantize_validation.CASES[kernel.capability](packed_format)


def _pitched_cases(packed_format: Format) -> list[dict[str, int]]:
    columns = _pitched_columns(packed_format)
    if columns % PITCHED_MULTIPLE:
        return []
    row = columns // packed_format.block_length  # in blocks
    return [{"blocks": 4 * row, "first": row, "packed_offset": 1, "padding": 24},
            {"blocks": -(-MANY // columns) * row, "padding": 8}]


def _pitched_columns(packed_format: Format) -> int:
    if isinstance(packed_format, RowFormat):
        return packed_format.block_length
    return 3 * math.lcm(packed_format.block_length, PITCHED_MULTIPLE)


def check(kernel: Kernel, packed_format: Format | None, dtype: torch.dtype,
          device: torch.device, is_quick: bool = False):
    """Checks a kernel in all its cases, and for rows of several lengths.

    Args:
        kernel: With a capability for `packed_format` and `dtype`.
        packed_format: One with the `kernel_key` of the weight's; None for a capability without
            formats.
        dtype: As in `Kernel`.
        device: That runs it.
        is_quick: Whether its smallest case will do.

    Raises:
        WrongResult: A result differs from the reference. The kernel may raise anything else.
    """
    check_case = {
        "dequantize": _check_dequantize, "channels_last": _check_channels_last,
        "add_rounded": _check_add_rounded,
        "linear": _check_linear, "attention": _check_attention, "int8_rows": _check_int8_rows,
        "int8_tokens": _check_int8_tokens, "pack_blocks": quantize_validation.check_blocks,
        "pack_columns": quantize_validation.check_columns,
        "pack_rows": quantize_validation.check_rows,
        "pack_row_columns": quantize_validation.check_row_columns
    }[kernel.capability]
    count = 1 if is_quick else None
    for example in _examples(kernel, packed_format)[:count]:
        for case in cases_of(kernel, example)[:count]:
            try:
                check_case(kernel.run, example, dtype, device, **case)
            except WrongResult as error:
                where = f" of {example}" if example else ""
                raise WrongResult(f"{error} in the case {case}{where}") from None


def _examples(kernel: Kernel, packed_format: Format | None) -> Sequence[Format | None]:
    """Returns formats that a kernel is checked with: of rows, several that have the same key."""
    if not isinstance(packed_format, RowFormat):
        return [packed_format]
    multiple = int8_codes.GROUP if kernel.capability == "int8_rows" else 1
    formats = formats_of_key(packed_format.kernel_key, multiple)
    # torch takes long for columns in order, and the cases of one format have all lengths
    return formats[:1] if kernel.capability == "pack_row_columns" else formats


def report_wrong(case: str, device: torch.device, error: Exception | str):
    """Warns of wrong values and asks for a report: only users with that device can notice them."""
    log.warning("A kernel gives wrong values here (%s on %s, torch %s, %s: %s), so "
                "torch does its work, slower; please report this line at %s.", case,
                device_name(device), torch.__version__,
                f"{platform.system()} {platform.release()}", error, ISSUES)


def probe(dequantize: Callable[..., None], device: torch.device):
    """Dequantises one block.

    Args:
        dequantize: As `Kernel.run`.
        device: That runs it.

    Raises:
        WrongResult: The values are wrong. `dequantize` may raise anything else.
    """
    packed_format = FORMATS["Q8_0"]
    block = torch.zeros(packed_format.block_bytes, dtype=torch.uint8, device=device)
    out = torch.full((packed_format.block_length,), torch.nan, dtype=torch.float32, device=device)
    dequantize(packed_format, [block], out, 0)
    if out.any():
        raise WrongResult("a block of zeros was dequantized to other values")


def _check_dequantize(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                      device: torch.device, blocks: int, first: int = 0, omitted: int = 0,
                      packed_offset: int = 0, out_offset: int = 0, padding: int = 0):
    """Checks "dequantize" from block `first` on.

    Args:
        omitted: Values at the end of the last block that are not requested.
        packed_offset: How many elements behind an aligned address the weight's tensors are. The
            other offsets mean the same.
        padding: Elements behind each row of the output, which has a pitch then.
    """
    tensors = random_tensors(packed_format, blocks, device)
    stop = blocks * packed_format.block_length - omitted
    count = stop - first * packed_format.block_length
    if any(base.__name__ == "Codebook4Bit" for base in type(packed_format).__mro__):
        tensors[0] = tensors[0][:-(-stop // 2)]  # the last block of these formats may be short
    expected = torch.empty(count, dtype=dtype, device=device)
    packed_format.dequantize_into(tensors, expected, first)
    packed = [misaligned_copy(tensor, packed_offset) for tensor in tensors]
    if padding:
        expected = expected.view(-1, _pitched_columns(packed_format))
    _check_bits(expected, out_offset,
                lambda result: run(packed_format, packed, result, first), padding)


def _check_channels_last(run: Callable[..., None], packed_format: None, dtype: torch.dtype,
                         device: torch.device, source: torch.dtype, shape: tuple[int, int, int],
                         packed_offset: int, out_offset: int):
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randn(shape, generator=generator, dtype=torch.float32).to(device, source)
    values[0, 0, 0], values[0, 1, -1] = torch.nan, torch.inf
    expected = values.to(dtype).transpose(1, 2).contiguous()
    values = misaligned_copy(values, packed_offset)
    _check_bits(expected, out_offset, lambda result: run(values, result))


def _check_add_rounded(run: Callable[..., None], packed_format: None, dtype: torch.dtype,
                       device: torch.device, rows: int, columns: int, offset: int = 0):
    generator = torch.Generator().manual_seed(rows)
    shape, limits = (rows, columns), torch.finfo(dtype)
    value, change = (torch.randn(shape, generator=generator, dtype=torch.float32)
                     for _ in range(2))
    if value.numel() > 1:
        value[:, ::7] *= 10 * limits.tiny  # near the numbers that are subnormal in float16
        value[0, :4] = torch.tensor(
            [torch.nan, torch.inf, limits.max, -limits.max], dtype=torch.float32)
    value = value.to(device, dtype)
    change = (change * value.float().abs().cpu().nan_to_num(1) / 100).to(device, dtype)
    change = misaligned_copy(change, offset)
    expected = stochastic_rounding.stochastic_round(value.float() + change, dtype)
    _check_bits(expected, offset, lambda result: run(result.copy_(value), change))


def _check_bits(expected: torch.Tensor, out_offset: int,
                write: Callable[[torch.Tensor], None], padding: int = 0):
    """Checks that `write(out)` writes the bits of `expected` and nothing outside of `out`, whose
    rows have `padding` behind them."""
    count, dtype = expected.numel(), expected.dtype
    start = 16 + out_offset
    extent = count + len(expected) * padding if padding else count
    padded = torch.full((start + extent + 16,), CANARY, dtype=dtype, device=expected.device)
    result = padded[start:][:extent]
    if padding:
        rows = result.view(len(expected), -1)
        result, behind = rows.split((expected.shape[1], padding), 1)
    else:
        result, behind = result.view(expected.shape), result[:0]
    write(result)
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    differs = (result.view(bits) != expected.view(bits)) & ~(result.isnan() & expected.isnan())
    if wrong := differs.sum().item():
        raise WrongResult(f"{wrong} of {count} values differ from the reference")
    around = padded[:start], padded[start + extent:], behind
    if any((values != CANARY).any() for values in around):
        raise WrongResult("the kernel wrote outside its output")


def _check_linear(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                  device: torch.device, tokens: int, values: int, columns: int,
                  added: str = "none", packed_offset: int = 0, input_offset: int = 0):
    """Checks "linear". added: "none", "bias" or "matrix", whose strides are odd. values, columns:
    as in `_shape`."""
    rows, columns = _shape(values, columns, packed_format)
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, device,
                             bounded=True)
    generator = torch.Generator().manual_seed(tokens)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32).to(device, dtype)

    input = random(tokens, columns)
    addend = None
    if added == "bias":
        addend = random(rows).expand(tokens, rows)
    elif added == "matrix":
        addend = random(rows, tokens).t()
    result = torch.full((tokens, rows), torch.nan, dtype=dtype, device=device)
    packed = [misaligned_copy(tensor, packed_offset) for tensor in tensors]
    run(packed_format, packed, misaligned_copy(input, input_offset), addend, result)
    weight = packed_format.dequantize_into(tensors,
                                           input.new_empty((rows, columns), dtype=torch.float32))
    error = _product_error(input, weight, addend, result)
    if not error <= 1:  # NaN too
        error = min(error, _product_error(input, weight.to(dtype), addend, result))
    if not error <= 1:
        raise WrongResult(f"the error of a product is {error:.3g} times what rounding allows")


def _check_attention(run: Callable[..., None], packed_format: None, dtype: torch.dtype,
                     device: torch.device, sizes: tuple[int, int, int, int, int, int, int],
                     masked: str = "none", offset: int = 0):
    """Checks "attention". masked: "none", "keys" (one mask for all queries) or "scores", some of
    them -inf, all in one row."""
    batch, heads, key_heads, queries, keys, width, value_width = sizes
    generator = torch.Generator().manual_seed(keys)

    def random(heads: int, tokens: int, width: int) -> torch.Tensor:
        values = torch.randn((batch, tokens, heads, width), generator=generator,
                             dtype=torch.float32)
        return misaligned_copy(values.to(device, dtype), offset).transpose(1, 2)

    query, key = random(heads, queries, width), random(key_heads, keys, width)
    value, mask, scale = random(key_heads, keys, value_width), None, 2 * width**-0.5
    query[:, :, 0] *= 30  # sharp
    if masked != "none":
        shape = (batch, 1, 1, keys) if masked == "keys" else (1, heads, queries, keys)
        mask = torch.randn(shape, generator=generator, dtype=torch.float32)
        mask[mask > 1] = -torch.inf
        mask[:, :, -1] = -torch.inf
        mask = mask.to(device).expand(batch, heads, queries, keys)
    padded = torch.full((batch, queries, heads + 1, value_width), CANARY, dtype=dtype,
                        device=device)
    result = padded[:, :, :heads].transpose(1, 2)
    run(query, key, value, mask, scale, result)
    query, key, value, result = (tensor.cpu().double() for tensor in (query, key, value, result))
    key, value = (tensor.repeat_interleave(heads // key_heads, 1) for tensor in (key, value))
    scores = scale * query @ key.transpose(2, 3) + (0 if mask is None else mask.cpu().double())
    shares = scores.softmax(-1).nan_to_num()  # where all is masked: zeros
    allowed = (torch.finfo(dtype).eps + ATTENTION_ERROR) * (shares @ value.abs()) + SUBNORMAL
    if wrong := (~((result - shares @ value).abs() <= allowed)).sum().item():
        raise WrongResult(f"{wrong} of {result.numel()} values differ by more than rounding allows")
    if (padded[:, :, heads:] != CANARY).any():
        raise WrongResult("the kernel wrote outside its output")
    undefined = random(key_heads, keys, value_width)
    undefined[-1, -1, -1, -1] = torch.nan
    run(*(tensor.to(device, dtype) for tensor in (query, key[:, ::heads // key_heads])),
        undefined, None, scale, result := torch.empty_like(padded)[:, :, :heads].transpose(1, 2))
    if not result[-1, -1, :, -1].isnan().all():
        raise WrongResult("an undefined value became a number")


def _check_int8_rows(run: Callable[..., None], packed_format: Format, dtype: torch.dtype,
                     device: torch.device, values: int, columns: int, first: int = 0,
                     packed_offset: int = 0):
    rows, columns = _shape(values, columns, packed_format, int8_codes.GROUP)
    block = first * columns // packed_format.block_length
    tensors = random_tensors(packed_format, rows * columns // packed_format.block_length, device,
                             bounded=True)
    dense = torch.empty((rows - first, columns), dtype=torch.float32, device=device)
    packed_format.dequantize_into(tensors, dense, block)
    packed = [misaligned_copy(tensor, packed_offset) for tensor in tensors]
    _check_codes(dense, lambda *out: run(packed_format, packed, *out, block))


def _check_int8_tokens(run: Callable[..., None], packed_format: None, dtype: torch.dtype,
                       device: torch.device, rows: int, columns: int, offset: int = 0):
    columns = -(-columns // int8_codes.GROUP) * int8_codes.GROUP
    generator = torch.Generator().manual_seed(rows)
    input = torch.randn((rows, columns), generator=generator, dtype=torch.float32).to(device, dtype)
    input[:, 5] *= 50
    if rows > 3:
        input[1], input[2, -3], input[3, -3] = 0, torch.nan, torch.inf
    input = misaligned_copy(input, offset)
    _check_codes(input.float(), lambda *out: run(input, *out))


def _check_codes(values: torch.Tensor, encode: Callable[[torch.Tensor, torch.Tensor], None]):
    """Checks int8 codes and scales of the rows of `values @ R`.

    The reference is computed in float64 on the CPU, because the device may be set to round what it
    multiplies in float32.

    Args:
        values: float32 (n, K).
        encode: encode(codes, scales) writes int8 (n, K) and float32 (n,).
    """
    codes = torch.full(values.shape, -128, dtype=torch.int8, device=values.device)
    scales = torch.full((len(values),), -1.0, dtype=torch.float32, device=values.device)
    encode(codes, scales)
    codes, scales = codes.cpu(), scales.cpu()
    expected = torch.empty_like(scales)
    rows = int8_codes.rotate(values.cpu().double())
    int8_codes.quantize_into(rows.float(), torch.empty_like(codes), expected)
    is_close = torch.isclose(scales, expected, rtol=1e-5, atol=0, equal_nan=True)
    if wrong := (~is_close).nonzero().flatten().tolist():
        raise WrongResult(f"{len(wrong)} of {len(scales)} scales are wrong, that of row {wrong[0]} "
                          f"is {scales[wrong[0]].item():g} instead of "
                          f"{expected[wrong[0]].item():g}")
    errors = (codes.double() - rows / scales.unsqueeze(-1)).abs()[expected.isfinite()]
    largest = errors.max().item()
    if not largest <= 0.5 + NEAR_TIE:
        raise WrongResult(f"a code is {largest:.3g} from its value, where rounding allows "
                          f"{0.5 + NEAR_TIE},")


def _shape(values: int, columns: int, packed_format: Format,
           multiple: int = 1) -> tuple[int, int]:
    """Returns rows and columns of a weight of at least so many values and columns, the columns a
    multiple of `multiple`; of formats of rows always theirs."""
    multiple = math.lcm(packed_format.block_length, multiple)
    columns = -(-columns // multiple) * multiple
    if isinstance(packed_format, RowFormat):
        columns = packed_format.block_length
    return max(ROWS, values // columns), columns


def _product_error(input: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None,
                   result: torch.Tensor) -> float:
    """Returns the largest error of `result`, in units of what a sum in float32 that is rounded once
    may have."""
    eps = torch.finfo(result.dtype).eps
    smallest_step = max(eps * torch.finfo(result.dtype).tiny, SUBNORMAL)
    addend = result.new_zeros(()) if addend is None else addend
    # On the CPU, because MPS has no float64.
    input, weight, addend, result = (tensor.cpu().double()
                                     for tensor in (input, weight, addend, result))
    expected = input @ weight.t() + addend
    magnitude = input.abs() @ weight.abs().t() + addend.abs()
    allowed = eps * expected.abs() + 1e-5 * magnitude + smallest_step
    return ((result - expected).abs() / allowed).max().item()


def misaligned_copy(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """Returns the same values `elements` elements behind an address that is a multiple of 64."""
    if not elements:
        return tensor
    out = tensor.new_empty(tensor.numel() + elements)[elements:].view(tensor.shape)
    return out.copy_(tensor)


def random_tensors(packed_format: Format, blocks: int, device: torch.device,
                   bounded: bool = False) -> list[torch.Tensor]:
    """Returns the tensors of a weight of random blocks.

    Args:
        packed_format: Of the weight.
        blocks: Their number.
        device: Of the tensors.
        bounded: Whether all values are finite and at most `MAX_ABS`.
    """
    generator = torch.Generator().manual_seed(blocks)
    if packed_format.qparams:
        data = _random_codes(packed_format, blocks, generator, bounded)
        qparams = [_random_qparam(packed_format, qparam, qparam.length(blocks), generator,
                                  bounded).to(device) for qparam in packed_format.qparams]
        return [data.to(device), *qparams]
    pool = torch.randint(0, 256, (1024 if bounded else blocks + 16, packed_format.block_bytes),
                         generator=generator, dtype=torch.uint8)
    values = packed_format.dequantize(pool).abs()
    if bounded:
        pool = pool[values.amax(-1) <= MAX_ABS]  # NaN compares false
    else:
        # No values that some devices flush to zero and others do not; this one may have done so.
        has_subnormal = ((values > 0) & (values < SUBNORMAL)).any(-1)
        pool = pool[~has_subnormal & (values != 0).any(-1)]
    return [pool[torch.arange(blocks) % len(pool)].to(device)]


def _random_codes(packed_format: Format, blocks: int, generator: torch.Generator,
                  bounded: bool) -> torch.Tensor:
    """Returns random codes, uint8; of floats of 8 bits only finite and small ones, if bounded."""
    count = blocks * packed_format.block_bytes
    if bounded and isinstance(packed_format, RowFormat) and packed_format.layout.codes.bits == 8:
        usable = (packed_format.code_numbers().abs() <= MAX_CODE).nonzero().flatten()
        return usable[torch.randint(len(usable), (count,), generator=generator)].to(torch.uint8)
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


def _random_qparam(packed_format: Format, qparam: QParam, count: int, generator: torch.Generator,
                   bounded: bool) -> torch.Tensor:
    """Returns `count` random numbers of a tensor of a weight, of which none is extreme; of rows
    they have signs.

    Args:
        bounded: whether bytes that stand for floats stand for small ones.
    """
    if not isinstance(packed_format, RowFormat):
        return torch.rand(count, generator=generator, dtype=qparam.dtype)
    layout = packed_format.layout
    if qparam.name == "group_of_column":
        groups = torch.randint(layout.groups, (layout.columns,), generator=generator)
        return groups.to(torch.int16).view(torch.uint8)
    numbers = {"scale": layout.scale, "minimum": layout.minimum}.get(qparam.name)
    kind = numbers.kind if numbers else ""
    if kind in EXPONENTS:
        lowest, highest = EXPONENTS[kind][bounded]
        return torch.randint(lowest, highest, (count,), generator=generator, dtype=torch.uint8)
    if qparam.dtype == torch.uint8 and kind in ("", "bytes"):
        return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    dtype = NUMBER_DTYPES[kind or "f32"]
    count = count * qparam.dtype.itemsize // dtype.itemsize
    values = 0.125 + torch.rand(count, generator=generator, dtype=torch.float32)
    values *= torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return values.to(dtype).view(qparam.dtype)
