"""FAST products on a CPU: of integers, faster than `product.linear`, less exact.

x W^T = (x R) (W R)^T, both operands rotated and in int8 codes with one scale a row (see
`int8_codes`). The weight is encoded again for each product. The low-rank branch stays in float, on
the unrotated input.
"""
import functools
from collections.abc import Callable

import torch

from .. import cpu_features, kernels
from ..formats.base import Format
from ..kernels import int8_codes
from ..lasting_memory import cached_on_device
from ..low_rank import LowRank
from . import workspace

# With fewer rows of the input the exact product is as fast, since most of the time is spent on the
# weight. Without a kernel for the weight's codes torch makes them, in many passes: on a GPU these
# would take longer than the exact product.
MIN_TOKENS, MIN_TOKENS_WITHOUT_KERNEL = 128, 512
ROW_MULTIPLE = 8  # rows of the weight that are multiplied together
# Sums of more products of codes could overflow int32.
MAX_COLUMNS = (1 << 31) // (int8_codes.LARGEST_CODE ** 2)


@cached_on_device
def multiplies_integers(device: torch.device) -> bool:
    """Returns whether a device is a CPU whose int8 units (VNNI) torch multiplies correctly with."""
    if device.type != "cpu" or not cpu_features.has_vnni():
        return False
    signs = torch.tensor((-1, 1), dtype=torch.int8, device=device).repeat(32, int8_codes.GROUP // 2)
    signs[::2] = 1
    codes = signs * int8_codes.LARGEST_CODE  # sums of their products overflow int16
    try:
        sums = _int_mm(codes, codes.t())
    except RuntimeError:  # a build of torch without the product
        return False
    codes = codes.float()
    return torch.equal(sums.float(), codes @ codes.t())


def _row_encoder(device: torch.device, packed_format: Format, tokens: int, rows: int,
                 columns: int) -> Callable | None:
    """Chooses what encodes the weight, with the signature of `int8_codes.encode_rows`.

    Returns None where the exact product should run.
    """
    if (
        packed_format.plain_dtype
        or columns % int8_codes.GROUP
        or columns > MAX_COLUMNS
        or rows % ROW_MULTIPLE
        or tokens < MIN_TOKENS
        or not multiplies_integers(device)
    ):
        return None
    if kernels.multiplies(packed_format, columns):
        encode = kernels.find("int8_rows", device, packed_format, torch.int8)
        if encode is not None:
            return encode
    if tokens < MIN_TOKENS_WITHOUT_KERNEL:
        return None
    return functools.partial(int8_codes.encode_rows, dequantize_into=kernels.dequantize_into)


def multiply(input: torch.Tensor, packed_format: Format, packed: list[torch.Tensor], rows: int,
             bias: torch.Tensor | None, low_rank: LowRank | None) -> torch.Tensor | None:
    """Computes `product.linear` in integers; returns None where the exact product should run.

    It needs K to be a multiple of 256 and N of 8. A row of the input or of the weight that is not
    finite gives NaN.

    Args:
        input: (M, K).
        packed_format: of the weight, without a low rank.
        packed: its tensors, contiguous.
        rows: N.
        bias: (N,) or None.
        low_rank: in the dtype of `input`, or None.
    """
    device, (tokens, columns) = input.device, input.shape
    encode = _row_encoder(device, packed_format, tokens, rows, columns)
    if encode is None:
        return None
    added = None if low_rank is None else low_rank.product(input, rows)
    codes, scales = _encode_tokens(input.contiguous())
    out = input.new_empty((tokens, rows))
    # bytes that the codes of a row of the weight and its sums, in int32 and float32, take
    row_bytes = columns + tokens * 2 * torch.float32.itemsize
    step = workspace.rows_within(workspace.workspace_bytes(device), packed_format, columns,
                                 row_bytes, ROW_MULTIPLE)
    with workspace.workspace(device) as take:
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            weight = take((stop - start, columns), torch.int8)
            weight_scales = torch.empty(len(weight), dtype=torch.float32, device=device)
            encode(packed_format, packed, weight, weight_scales,
                   start * columns // packed_format.block_length)
            sums = _int_mm(codes, weight.t()) * weight_scales
            _finish(sums, scales, None if bias is None else bias[start:stop],
                    None if added is None else added[:, start:stop], out[:, start:stop])
    return out


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiplies int8 (M, K) and (K, N), with sums in int32."""
    return torch._int_mm(a, b)  # pyright: ignore[reportPrivateImportUsage]


def _encode_tokens(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes and scales of the rows of an input."""
    codes = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    scales = torch.empty(len(input), dtype=torch.float32, device=input.device)
    kernel = kernels.find("int8_tokens", input.device, None, input.dtype)
    encode = kernel or int8_codes.encode_tokens
    encode(input, codes, scales)
    return codes, scales


def _finish(sums: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
            added: torch.Tensor | None, out: torch.Tensor):
    """Writes `sums * scales + bias + added` to `out`, rounded once.

    Args:
        sums: float32 (M, n), overwritten.
        scales: float32 (M,).
        bias: (n,) or None.
        added: (M, n) or None.
        out: (M, n).
    """
    scales = scales.unsqueeze(-1)
    if bias is not None and added is not None:
        torch.add(torch.addcmul(bias.float(), sums, scales, out=sums), added, out=out)
        return
    addend = bias if added is None else added
    if addend is None:
        torch.mul(sums, scales, out=out)
    else:
        torch.add(sums.mul_(scales), addend, out=out)
