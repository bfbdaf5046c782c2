"""FAST products by comfy_kitchen's kernels.

SVDQuant's quantise the input of a layer to 4 bits too, as Nunchaku's do, and add the low rank in
the same call, to which the LoRAs of the layer belong. SVDQuant and AWQ weights are multiplied as
they are held: only their scales are brought into the kernels' order, for each product. Weights of
other formats are encoded in int8 for each product, rotated as ComfyUI's int8_convrot.

comfy_kitchen's registry says which device has which kernels. Everywhere else, and for other
numbers of tokens, the product is another: see `product`.
"""
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy_kitchen.constraints import FunctionConstraints, validate_function_call
from comfy_kitchen.float_utils import to_blocked
from comfy_kitchen.registry import registry

from .. import kernels
from ..formats.base import Format
from ..formats.bits import reinterpret
from ..formats.comfy_quant import W4A16, W4A16_FLOAT, W4A16_HALF
from ..formats.low_rank_and_joined import AddedLowRank, Joined, without_low_rank
from ..formats.row_layout import RowFormat
from ..formats.svdquant import (
    AWQ_INT4,
    AWQ_INT4_HALF,
    INPUT_SHIFT,
    SVDQUANT_INT4,
    SVDQUANT_INT4_HALF,
    SVDQUANT_NVFP4,
    ShiftedInput,
)
from ..kernels import int8_codes
from ..low_rank import LowRank, Slice
from . import AUTOMATIC, FAST, fast_on_cpu, int8_epilogue, workspace
from .rounded_sum import add_branch

# comfy_kitchen's backends with kernels, the first one that has them is used. Its "eager" one is the
# reference: floats in torch, slower on a CPU than the products of this pack.
BACKENDS = ("hip", "cuda")
TITLES = {"hip": "AMD kernels", "cuda": "CUDA kernels"}
DISABLED = {
    "hip": "something in ComfyUI has turned them off",
    "cuda": "ComfyUI has turned them off, as it does below a PyTorch for CUDA 13; this one is for"
            f" CUDA {torch.version.cuda}, install one for CUDA 13 (cu130) or newer"}
NEWER = "a newer comfy-kitchen may have them (pip install -U comfy-kitchen)"
# Rows of the input from which codes of 4 bits are worth their error; with fewer, most of the time
# is spent on reading the weight. Up to how many rows the kernel of AWQ multiplies with codes.
MIN_TOKENS, MAX_AWQ_TOKENS = 17, 256
# Rows from which encoding a weight in int8 for each product is worth its time: an estimate.
INT8, MIN_INT8_TOKENS = "int8", 512
# Architectures whose integers of 8 bits are not LEAST_RATE times as fast as floats of 16, by their
# maker: (how its name begins, the rate, where it is said, when that was read). RDNA 3, B300.
LEAST_RATE = 1.5
SLOW_INT8 = (
    ("gfx110", 1.0, "https://gpuopen.com/learn/using_matrix_core_amd_rdna4", "2026-11-30"),
    ("sm_103", 0.06, "https://www.nvidia.com/en-us/data-center/hgx", "2026-11-30"),
)
ROW_MULTIPLE = 8  # the kernels read the scales of several rows at once
COLUMN_MULTIPLE = 32
ALIGNMENT = 16  # bytes, of the addresses of codes
EMPTY_RANK = 16  # of a low rank of zeros, for weights without one

ORDERED = "quantize_nvfp4"  # the function that must write codes in the order of the files
# names of operands that have the dtype of the input
FLOAT_OPERANDS = "x", "smooth", "lora_down", "ascales", "wscales", "wzeros", "lora_up", "out_dtype"

COMFYUI_KERNELS, PACK_KERNELS = "ComfyUI's kernels", "this pack"

Backend = str
_Parts = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Product:
    """One kind of product.

    Attributes:
        title: for people.
        functions: of comfy_kitchen.
        run: computes it; see `_svdquant`.
        least, most: rows of the input.
    """

    title: str
    functions: tuple[str, ...]
    run: Callable[..., torch.Tensor]
    least: int
    most: float


class Used(NamedTuple):
    """What multiplies with a weight.

    Attributes:
        title: of a fast product, for people; "": the product is exact.
        owner: whose the fast product is.
        why_exact: why there is no fast one, where one was asked for.
    """

    title: str = ""
    owner: str = ""
    why_exact: str = ""


def why_off(packed_format: Format, device: torch.device, dtype: torch.dtype) -> str:
    """Returns why comfy_kitchen's kernels do not multiply a weight, and what to do about it.

    Args:
        packed_format: of the weight.
        device: where the layer runs.
        dtype: of its input.

    Returns:
        A clause, "" where they do, or where there are none for the format or the type of device.
    """
    name = product_of(packed_format)
    return _why_off(name, device, dtype) if name else ""


def _why_off(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda" or _backend(name, device, dtype):
        return ""
    backend = "cuda" if torch.version.hip is None else "hip"
    problem = _problem(backend, name, device, dtype)
    return f"comfy_kitchen's {TITLES[backend]} are off: {problem}"


def runs(packed_format: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether comfy_kitchen's kernels multiply a weight; see `why_off`."""
    name = product_of(packed_format)
    return name is not None and _backend(name, device, dtype) is not None


def used(packed_format: Format, device: torch.device, dtype: torch.dtype, compute: str) -> Used:
    """Returns what multiplies with a weight, where the input has enough tokens.

    Args:
        packed_format: of the weight.
        device: where the layer runs.
        dtype: of its input.
        compute: of the layer, see `PackedLayer`.
    """
    if compute not in (FAST, AUTOMATIC) or packed_format.plain_dtype:
        return Used()
    if compute == AUTOMATIC:
        return Used(why_exact=why_off(packed_format, device, dtype))
    name = product_of(packed_format) or INT8
    if _backend(name, device, dtype):
        return Used(PRODUCTS[name].title, COMFYUI_KERNELS)
    if why_exact := why_not_fast(device, dtype, name):
        return Used(why_exact=why_exact)
    return Used(PRODUCTS[INT8].title, PACK_KERNELS)


def why_not_fast(device: torch.device, dtype: torch.dtype, name: str = INT8) -> str:
    """Returns why a device multiplies exactly where "fast" was asked for, "" where it does not.

    Args:
        device: where the layer runs.
        dtype: of its input.
        name: a key of PRODUCTS.
    """
    if _backend(name, device, dtype) or fast_on_cpu.multiplies_integers(device):
        return ""
    return (_why_off(name, device, dtype)
            or f"{device} has no int8 units that this pack uses")


def product_of(packed_format: Format) -> str | None:
    """Returns a key of PRODUCTS for a format, None where there is no such product."""
    if isinstance(packed_format, Joined):
        names = {product_of(part.format) for part in packed_format.parts}
        return names.pop() if len(names) == 1 else None
    while isinstance(packed_format, (AddedLowRank, ShiftedInput)):
        packed_format = packed_format.base
    return PRODUCT_OF.get(packed_format.family) if isinstance(packed_format, RowFormat) else None


def _backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    return next((backend for backend in BACKENDS if registry.is_available(backend)
                 and not _problem(backend, name, device, dtype)), None)


def _problem(backend: Backend, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns why a backend does not compute a product, "" where it does."""
    if name == INT8 and device.type == "cuda" and (architecture := _slow_int8(device)):
        return f"{architecture} multiplies integers of 8 bits hardly faster than floats of 16"
    if not registry.is_available(backend):
        status = registry.list_backends().get(backend, {})
        if status.get("disabled"):
            return DISABLED[backend]
        return f"{status.get('unavailable_reason') or 'they are missing'}; {NEWER}"
    for function in PRODUCTS[name].functions:
        constraints = registry.get_constraints(backend, function)
        if constraints is None:
            return f"they have no {function} for this GPU; {NEWER}"
        if not constraints.default_devices & {device.type, "*"}:
            return f"they are not for {device.type}"
        problem = _unmet(constraints, device, dtype)
        if problem:
            return problem
        if function == ORDERED and not _orders_codes(
                registry.get_implementation(function, backend=backend)):
            return f"their {function} writes codes in one order only; {NEWER}"
    return ""


@functools.cache
def _slow_int8(device: torch.device) -> str:
    """Returns the architecture of a GPU of `SLOW_INT8`, "" for others."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    else:
        name = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return name if name.startswith(tuple(row[0] for row in SLOW_INT8)) else ""


@functools.cache
def _orders_codes(quantize: Callable) -> bool:
    """Returns whether a function of comfy_kitchen, from May 2026 on, writes low nibbles first."""
    return "hi_first" in inspect.signature(quantize).parameters


def _unmet(constraints: FunctionConstraints, device: torch.device, dtype: torch.dtype) -> str:
    """Returns which of the constraints of a function a device or a dtype does not meet."""
    least = constraints.min_compute_capability
    capability = None
    if least is not None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)  # of this device, not the current one
        if capability < least:
            return (f"this GPU has compute capability {capability[0]}.{capability[1]}, they need"
                    f" {least[0]}.{least[1]}")
    operands: dict[str, torch.Tensor | torch.dtype | None] = dict.fromkeys(FLOAT_OPERANDS, dtype)
    result = validate_function_call(constraints, operands, compute_capability=capability)
    return "" if result.success else result.failure_reason or f"they do not take {dtype}"


def multiply(input: torch.Tensor, packed_format: Format, packed: list[torch.Tensor], rows: int,
             bias: torch.Tensor | None, low_rank: LowRank | None) -> torch.Tensor | None:
    """Computes `product.linear` by comfy_kitchen; returns None where it has no kernel for the
    format, the device or the number of tokens.

    Args:
        input: (M, K).
        packed_format: of the weight.
        packed: its tensors, contiguous.
        rows: N.
        bias: (N,) or None.
        low_rank: in the dtype of `input`, or None.
    """
    backend = _backend_for(packed_format, input, rows)
    if backend is None:
        return None
    return _multiply(packed_format, packed, input, rows, bias, low_rank, backend)


def _backend_for(packed_format: Format, input: torch.Tensor, rows: int) -> Backend | None:
    name = product_of(packed_format)
    if name is None:
        fits = (not packed_format.plain_dtype and not rows % ROW_MULTIPLE
                and not input.shape[1] % int8_codes.GROUP and len(input) >= PRODUCTS[INT8].least)
        return _backend(INT8, input.device, input.dtype) if fits else None
    sizes = [(part.rows, part.columns) for part in packed_format.parts] if isinstance(
        packed_format, Joined) else [(rows, input.shape[1])]
    fits = all(not size % ROW_MULTIPLE and not columns % COLUMN_MULTIPLE
               for size, columns in sizes)
    if not fits or not PRODUCTS[name].least <= len(input) <= PRODUCTS[name].most:
        return None
    return _backend(name, input.device, input.dtype)


def _multiply(packed_format: Format, tensors: list[torch.Tensor], input: torch.Tensor, rows: int,
              bias: torch.Tensor | None, low_rank: LowRank | None,
              backend: Backend) -> torch.Tensor:
    """Computes `input W^T + bias` plus a branch, input (M, K). Returns (M, N), N `rows`."""
    if product_of(packed_format) is None:
        return _int8(packed_format, tensors, input, rows, bias, low_rank, backend)
    if isinstance(packed_format, Joined):
        return _multiply_joined(packed_format, tensors, input, bias, low_rank, backend)
    names = ("codes", *(qparam.name for qparam in packed_format.qparams))
    parts = dict(zip(names, tensors))
    base, _, own = without_low_rank(packed_format, tensors)
    name = product_of(base)
    assert name is not None and isinstance(base, RowFormat)
    parts["codes"] = _aligned(parts["codes"]).view(rows, -1)
    own = None if own is None else own.to(input)
    return PRODUCTS[name].run(base, parts, input.contiguous(), bias, own, low_rank, backend)


def _multiply_joined(joined: Joined, tensors: list[torch.Tensor], input: torch.Tensor,
                     bias: torch.Tensor | None, low_rank: LowRank | None,
                     backend: Backend) -> torch.Tensor:
    """Computes `_multiply` of each part: the input of each is divided by factors of its own."""
    data, outs = tensors[0].view(-1), []
    for part in joined.parts:
        rows = slice(part.row, part.row + part.rows)
        columns = slice(part.column, part.column + part.columns)
        is_last = joined.axis == 0 or part is joined.parts[-1]
        outs.append(_multiply(
            part.format, part.tensors(data), input[:, columns], part.rows,
            bias[rows] if bias is not None and is_last else None,
            None if low_rank is None else _part_of(low_rank, rows, columns), backend))
    if joined.axis == 0:
        return torch.cat(outs, 1)
    total, *others = outs
    for out in others:
        total = total + out
    return total


def _part_of(low_rank: LowRank, rows: slice, columns: slice) -> LowRank | None:
    """Returns the branch of some rows and columns of a weight, None where it changes none."""
    ups, slices = [], []
    for part, up in low_rank.parts():
        start, stop = max(part.row, rows.start), min(part.row_end, rows.stop)
        if start < stop:
            ups.append(up[start - part.row:stop - part.row])
            slices.append(Slice(start - rows.start, stop - rows.start, part.rank, part.rank_end))
    return LowRank(low_rank.down[:, columns], tuple(ups), tuple(slices)) if ups else None


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    return codes.clone() if codes.data_ptr() % ALIGNMENT else codes


def _numbers(base: RowFormat, parts: _Parts, name: str) -> torch.Tensor:
    """Returns stored numbers of groups, (groups, N), a view in the dtype that they are stored in.
    """
    numbers = base.layout.scale if name == "scale" else base.layout.minimum
    assert numbers is not None
    return reinterpret(parts[name], numbers.dtype).view(-1, base.layout.groups).t()


def _smoothing(parts: _Parts, input: torch.Tensor) -> torch.Tensor:
    """Returns what the columns of the input are divided by, (K,) in its dtype."""
    columns = parts["column_scale"]
    return torch.reciprocal(columns, out=torch.empty_like(columns, dtype=input.dtype))


def _svdquant(base: RowFormat, parts: _Parts, input: torch.Tensor, bias: torch.Tensor | None,
              own: LowRank | None, low_rank: LowRank | None, backend: Backend) -> torch.Tensor:
    """Computes a product with codes of 4 bits on both sides.

    Args:
        base: of the codes.
        parts: names of the format's tensors -> these, the codes (N, K / 2).
        input: (M, K).
        bias: (N,) or None.
        own: the low rank of the weight, or None.
        low_rank: LoRAs, or None.
        backend: of comfy_kitchen.

    Returns:
        (M, N).
    """
    rows, shift = len(parts["codes"]), parts.get("input_shift")
    if own is None:
        joined = LowRank(input.new_zeros(EMPTY_RANK, input.shape[1]),
                         (input.new_zeros(rows, EMPTY_RANK),), (Slice(0, rows, 0, EMPTY_RANK),))
    else:
        joined = own.and_also(low_rank, rows)  # one slice: its own is of all rows
    scales = _numbers(base, parts, "scale")
    scales = torch.mul(scales, parts["row_scale"], out=input.new_empty(scales.shape))
    shifted = input
    if shift is not None:
        shifted = input + INPUT_SHIFT
        bias = (-shift if bias is None else bias.float() - shift).to(input.dtype)
    quantize, multiply = _functions("svdquant", backend)
    codes, input_scales, hidden = quantize(
        x=shifted, smooth=_smoothing(parts, input), lora_down=joined.down.t(),
        act_unsigned=shift is not None, lora_x=None if shift is None else input)
    _forget_buffers(quantize)
    out = multiply(
        act=codes, wgt=parts["codes"].view(torch.int8), ascales=input_scales, wscales=scales,
        lora_act_in=hidden, lora_up=joined.ups[0].contiguous(), bias=bias,
        act_unsigned=shift is not None)[:len(input)]
    return out if own is not None else _with_branch(out, input, low_rank)


def _forget_buffers(quantize: Callable):
    """Has comfy_kitchen release its buffers, which it keeps for each size and rank of an input."""
    buffers = getattr(quantize, "__globals__", {}).get("_SVDQUANT_WORKSPACE_CACHE")
    if isinstance(buffers, dict):
        buffers.clear()


def _with_branch(out: torch.Tensor, input: torch.Tensor,
                 low_rank: LowRank | None) -> torch.Tensor:
    """Adds LoRAs to a product that is already rounded."""
    return out if low_rank is None else add_branch(out, input, low_rank)


def _nvfp4(base: RowFormat, parts: _Parts, input: torch.Tensor, bias: torch.Tensor | None,
           own: LowRank | None, low_rank: LowRank | None, backend: Backend) -> torch.Tensor:
    """Computes a product with nvfp4 on both sides; see `_svdquant`."""
    quantize, multiply = _functions("nvfp4", backend)
    one, row_scale = input.new_ones((), dtype=torch.float32), parts["row_scale"]
    largest = row_scale.amax()
    codes, input_scales = quantize(x=input / _smoothing(parts, input), per_tensor_scale=one,
                                   epsilon=0.0, pad_16x=True, hi_first=False)
    scales = parts["scale"].view(torch.float8_e4m3fn).view(-1, base.layout.groups)
    out = multiply(
        a=codes, b=parts["codes"], tensor_scale_a=one, tensor_scale_b=largest,
        block_scale_a=input_scales, block_scale_b=to_blocked(scales, flatten=False), bias=None,
        out_dtype=input.dtype, alpha=None)[:len(input)]
    of_rows = (row_scale / largest).to(input.dtype)  # one, where all rows share a scale
    if own is None:
        out = _with_branch(out * of_rows, input, low_rank)
    else:
        added = own.and_also(low_rank, len(row_scale)).product(input, len(row_scale))
        out = torch.addcmul(added, out, of_rows)  # rounded once
    return out if bias is None else out + bias


def _awq(base: RowFormat, parts: _Parts, input: torch.Tensor, bias: torch.Tensor | None,
         own: LowRank | None, low_rank: LowRank | None, backend: Backend) -> torch.Tensor:
    """Computes a product with codes of 4 bits, the input in floats; see `_svdquant`."""
    numbers = base.layout.codes.numbers
    assert numbers is not None
    scales, minima = (_numbers(base, parts, name) for name in ("scale", "minimum"))
    branch = low_rank if own is None else own.and_also(low_rank, len(parts["codes"]))
    multiply, = _functions("awq", backend)
    out = multiply(
        x=input, qweight=parts["codes"].view(torch.int8),
        wscales=input.new_empty(scales.shape).copy_(scales),
        # for the kernel the code 8 is zero
        wzeros=torch.add(minima, scales, alpha=8 + numbers[0], out=input.new_empty(scales.shape)),
        bias=bias, group_size=base.layout.group)
    return _with_branch(out, input, branch)


def _int8(packed_format: Format, tensors: list[torch.Tensor], input: torch.Tensor, rows: int,
          bias: torch.Tensor | None, low_rank: LowRank | None, backend: Backend) -> torch.Tensor:
    """Computes a product with both sides rotated and in int8; see `_multiply`."""
    base, tensors, own = without_low_rank(packed_format, tensors)
    branch = low_rank if own is None else own.to(input).and_also(low_rank, rows)
    quantize, multiply = _functions(INT8, backend)
    columns, dtype, device = input.shape[1], input.dtype, input.device
    encode = None
    if kernels.multiplies(base, columns):
        encode = kernels.find("int8_rows", device, base, torch.int8)
    step = workspace.rows_within(workspace.workspace_bytes(device), base, columns,
                                 columns * (1 if encode else dtype.itemsize + 1), ROW_MULTIPLE)
    with workspace.workspace(device) as take:

        def encoded(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            shape, first = (stop - start, columns), start * columns // base.block_length
            if encode is None:
                dense = kernels.dequantize_into(base, tensors, take(shape, dtype), first)
                return quantize(weight=dense, group_size=int8_codes.GROUP)
            codes = take(shape, torch.int8)
            scales = torch.empty(len(codes), dtype=torch.float32, device=device)
            encode(base, tensors, codes, scales, first)
            return codes, scales

        def product_with(start: int, stop: int) -> Callable[..., torch.Tensor]:
            codes, scales = encoded(start, stop)
            return functools.partial(
                multiply, weight=codes, weight_scale=scales, convrot=True,
                convrot_groupsize=int8_codes.GROUP,
                bias=None if bias is None else bias[start:stop])

        if step >= rows:
            product = product_with(0, rows)
            if branch is not None and int8_epilogue.adds_before_rounding(product, input, rows,
                                                                         backend):
                change = int8_epilogue.residual_arguments(branch.product(input, rows))
                return product(x=input, out_dtype=dtype, **change)
            out = product(x=input, out_dtype=dtype)
        else:
            out = input.new_empty((len(input), rows))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                out[:, start:stop] = product_with(start, stop)(x=input, out_dtype=dtype)
    return _with_branch(out, input, branch)


def _functions(name: str, backend: Backend) -> list[Callable]:
    return [registry.get_implementation(function, backend=backend)
            for function in PRODUCTS[name].functions]


PRODUCTS = {
    "svdquant": _Product("SVDQuant", ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"),
                         _svdquant, MIN_TOKENS, float("inf")),
    "nvfp4": _Product("SVDQuant", ("quantize_nvfp4", "scaled_mm_nvfp4"), _nvfp4, MIN_TOKENS,
                      float("inf")),
    "awq": _Product("AWQ", ("gemv_awq_w4a16",), _awq, 1, MAX_AWQ_TOKENS),
    INT8: _Product("int8", ("quantize_int8_convrot_weight", "int8_linear"), _int8,
                   MIN_INT8_TOKENS, float("inf"))}
PRODUCT_OF = {
    SVDQUANT_INT4.name: "svdquant", SVDQUANT_INT4_HALF.name: "svdquant",
    SVDQUANT_NVFP4.name: "nvfp4",
    **{family.name: "awq" for family in (AWQ_INT4, AWQ_INT4_HALF, W4A16, W4A16_HALF, W4A16_FLOAT)}}
