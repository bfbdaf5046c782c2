"""`compute = "int8"`: the product of packed weights in whole numbers, faster than `product.linear`
and less exact.

x W^T = (x R) (W R)^T, both operands rotated and as int8 codes with one scale a row (see
`int8_codes`), the weight's made anew in each product. The low-rank branch stays in float, on the
input as it is.
"""
import functools
import math

import torch

from . import int8_codes, kernels, product, registration, workspace
from .format import FORMATS, Format
from .low_rank import LowRank
from .packed_tensor import PackedTensor

# With fewer rows of the input the exact product is as fast, since most of the time goes into the
# weight; CUDA's integer product takes no fewer. Without a kernel for the weight's codes torch makes
# them, in many passes. CUDA's numbers are estimates.
MIN_TOKENS = {"cpu": 128, "cuda": 17}
MIN_TOKENS_WITHOUT_KERNEL = {"cpu": 512, "cuda": 4096}
ROW_MULTIPLE = 8  # CUDA's product takes multiples of this as N
# Sums of more products of codes could leave int32.
MAX_COLUMNS = (1 << 31) // (int8_codes.LARGEST_CODE ** 2)
CUDA_CAPABILITY = (7, 5)  # the first with matrix units for int8


@functools.cache
def multiplies_integers(device: torch.device) -> bool:
    """Whether a device has units for int8 products and torch gives right ones: NVIDIA from Turing
    on, CPUs with VNNI."""
    if device.type == "cuda":
        capable = (
            torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= CUDA_CAPABILITY
        )
    else:
        capable = device.type == "cpu" and _has_vnni()
    if not capable:
        return False
    signs = torch.tensor((-1, 1), dtype=torch.int8, device=device).repeat(32, int8_codes.GROUP // 2)
    signs[::2] = 1
    codes = signs * int8_codes.LARGEST_CODE  # sums of these leave int16
    try:
        sums = torch._int_mm(codes, codes.t())
    except RuntimeError:  # a build of torch without the product
        return False
    codes = codes.cpu().float()
    return torch.equal(sums.cpu().float(), codes @ codes.t())


def _has_vnni() -> bool:
    """Whether the CPU sums products of bytes in int32; without that they may leave int16 on the
    way."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return getattr(torch.cpu, "_is_vnni_supported", lambda: False)()  # in older versions of torch


def _row_encoder(device: torch.device, packed_format: type[Format], value_dtype: torch.dtype | None,
                 tokens: int, rows: int, columns: int):
    """What makes the codes of the weight, called as `int8_codes.encode_rows`; None where the exact
    product is to run."""
    if (
        packed_format.plain_dtype
        or columns % int8_codes.GROUP
        or columns > MAX_COLUMNS
        or rows % ROW_MULTIPLE
        or tokens < MIN_TOKENS.get(device.type, math.inf)
        or not multiplies_integers(device)
    ):
        return None
    if columns % packed_format.block_length == 0:
        encode = kernels.find("int8_rows", device, packed_format, torch.int8, value_dtype)
        if encode is not None:
            return encode
    enough = tokens >= MIN_TOKENS_WITHOUT_KERNEL[device.type]
    return (
        functools.partial(int8_codes.encode_rows, dequantize_into=kernels.dequantize_into)
        if enough
        else None
    )


def _linear(input: torch.Tensor, packed: list[torch.Tensor], bias: torch.Tensor | None, format: str,
            rows: int, value_dtype: torch.dtype | None, down: torch.Tensor | None,
            ups: list[torch.Tensor], slices: list[int]) -> torch.Tensor:
    packed_format, device = FORMATS[format], input.device
    flat = input.reshape(-1, input.shape[-1])
    tokens, columns = flat.shape
    encode = _row_encoder(device, packed_format, value_dtype, tokens, rows, columns)
    if encode is None:
        return torch.ops.featherweight.linear(input, packed, bias, format, rows, value_dtype, down,
                                              ups, slices)
    low_rank = LowRank.from_operands(down, ups, slices)
    added = None if low_rank is None else low_rank.product(flat, rows)
    codes, scales = _encoded_tokens(flat.contiguous())
    out = input.new_empty((tokens, rows))
    # bytes for each row of the weight
    codes_and_sums = columns + tokens * 2 * torch.float32.itemsize
    step = workspace.rows_within(workspace.workspace_bytes(device), packed_format, columns,
                                 codes_and_sums, ROW_MULTIPLE)
    with workspace.workspace(device) as take:
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            weight = take((stop - start, columns), torch.int8)
            weight_scales = torch.empty(len(weight), dtype=torch.float32, device=device)
            encode(packed_format, packed, weight, weight_scales, value_dtype,
                   start * columns // packed_format.block_length)
            sums = torch._int_mm(codes, weight.t()) * weight_scales
            _finish(sums, scales, bias if bias is None else bias[start:stop],
                    added if added is None else added[:, start:stop], out[:, start:stop])
    return out.view(*input.shape[:-1], rows)


def _encoded_tokens(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of the rows of an input."""
    codes = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    scales = torch.empty(len(input), dtype=torch.float32, device=input.device)
    encode = (
        kernels.find("int8_tokens", input.device, None, input.dtype) or int8_codes.encode_tokens
    )
    encode(input, codes, scales)
    return codes, scales


def _finish(sums: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None,
            added: torch.Tensor | None, out: torch.Tensor):
    """`sums * scales + bias + added`, rounded once. sums: float32 (M, n), overwritten. scales:
    float32 (M,). bias: (n,) or None. added: (M, n) or None. out: (M, n)."""
    scales = scales.unsqueeze(-1)
    if bias is None and added is None:
        torch.mul(sums, scales, out=out)
    elif bias is None or added is None:
        torch.add(sums.mul_(scales), bias if added is None else added, out=out)
    else:
        torch.add(torch.addcmul(bias.float(), sums, scales, out=sums), added, out=out)


registration.register(f"int8_linear{registration.LINEAR_SCHEMA}", _linear, registration.fake_linear)


def linear(input: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None,
           value_dtype: torch.dtype | None = None, low_rank: LowRank | None = None) -> torch.Tensor:
    """`product.linear` in whole numbers, where the device, the shapes and the rows of the input
    allow it, else as it is.

    Needs K a multiple of 256, N of 8, no gradient. A row of the input, or of the weight, that is
    not finite gives NaN.
    """
    if input.shape[-1] != weight.shape[1] or (input.requires_grad and torch.is_grad_enabled()):
        return product.linear(input, weight, bias, value_dtype, low_rank)
    return torch.ops.featherweight.int8_linear(
        *product.operands(input, weight, bias, value_dtype, low_rank))
