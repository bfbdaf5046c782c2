"""`compute = "int8"` on a CPU: integer products, faster than `product.linear`, less exact.

x W^T = (x R) (W R)^T, both operands rotated and in int8 codes with one scale a row (see
`int8_codes`). The weight is encoded again for each product. The low-rank branch stays in float, on
the unrotated input.
"""
import functools
from collections.abc import Callable

import torch

from .. import cpu_features, kernels
from ..formats.base import FORMATS, Format
from ..formats.low_rank_and_joined import without_low_rank
from ..kernels import int8_codes, torch_registration
from ..lasting_memory import cached_on_device
from ..low_rank import LowRank
from ..tensor.packed_tensor import PackedTensor
from . import product, workspace

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


def _linear(input: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, format: str,
            rows: int, down: torch.Tensor | None, ups: list[torch.Tensor],
            slices: list[int]) -> torch.Tensor:
    packed_format, packed, own = without_low_rank(FORMATS[format], packed)
    device = input.device
    flat = input.reshape(-1, input.shape[-1])
    tokens, columns = flat.shape
    low_rank = LowRank.from_operands(down, ups, slices)
    if own is not None:
        low_rank = own.to(flat).and_also(low_rank, rows)
    encode = _row_encoder(device, packed_format, tokens, rows, columns)
    if encode is None:
        branch = (None, (), ()) if low_rank is None else low_rank.operands
        return torch.ops.featherweight.linear(input, packed, bias, packed_format.name, rows,
                                              *branch)
    added = None if low_rank is None else low_rank.product(flat, rows)
    codes, scales = _encode_tokens(flat.contiguous())
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
    return out.view(*input.shape[:-1], rows)


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


_linear_operator = torch_registration.register(
    f"int8_linear{torch_registration.LINEAR_SCHEMA}", _linear, torch_registration.fake_linear)


def linear(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None,
           low_rank: LowRank | None = None) -> torch.Tensor:
    """Computes `product.linear` in integers where that is possible and faster, else in floats.

    It needs K to be a multiple of 256, N of 8, and no gradient. A row of the input or of the weight
    that is not finite gives NaN.
    """
    if input.shape[-1] != weight.shape[1] or product.needs_gradient(input, bias):
        return product.linear(input, weight, bias, low_rank)
    return _linear_operator(*product.operands(input, weight, bias, low_rank))
