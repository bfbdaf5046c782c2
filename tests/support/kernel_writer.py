"""Writes kernels of convolutions in ComfyUI's own formats, as HSWQ's `native_convert_int8.py`."""

import torch
from host_formats import mark_of

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
          "float8_e4m3fn_rowwise": torch.float8_e4m3fn}
SCALES = {"one": (), "rows": (-1,), "columns": (-1, 1), "kernels": None}  # shapes


def rotated(kernel, size):
    """A kernel whose input channels are rotated in groups, at each of its positions; a rotation is
    its own inverse."""
    power = torch.ones(1, 1).double()
    while len(power) < size:
        power = torch.kron(power, H4)
    by_tap = kernel.double().view(*kernel.shape[:2], -1).transpose(1, 2)
    by_tap = by_tap.reshape(-1, size) @ (power / size**0.5)
    return by_tap.view(len(kernel), -1, kernel.shape[1]).transpose(1, 2).reshape(kernel.shape)


def write_kernel(kernel, name="int8_tensorwise", scale="kernels", group=0):
    """The parts of a kernel with its mark, and their values, as `native_convert_int8.py` of HSWQ.

    group: channels that are rotated together.
    """
    kernel = rotated(kernel, group) if group else kernel.double()
    ones = (1,) * (kernel.ndim - 1)
    peak = kernel.abs().max() if scale == "one" else kernel.abs().flatten(1).amax(1).view(-1, *ones)
    scales = (peak / (127 if name == "int8_tensorwise" else 448)).float()
    codes = kernel / scales
    codes = codes.round().clamp(-127, 127).char() if name == "int8_tensorwise" else codes.to(
        torch.float32).to(DTYPES[name])
    values = codes.double() * scales
    values = rotated(values, group) if group else values
    mark = {"format": name} | ({"convrot": True, "convrot_groupsize": group} if group else {})
    if scale != "one" and SCALES[scale]:
        scales = scales.view(SCALES[scale])
    return ({"weight": codes, "weight_scale": scales, "comfy_quant": mark_of(mark)},
            values.float())


def write_unet(weights, with_rotation=True):
    """What a file of HSWQ holds of a model: matrices and kernels in int8, those whose channels a
    power of four divides rotated; and the values."""
    stored, values = {}, {}
    for name, weight in weights.items():
        if weight.ndim < 2 or not name.endswith(".weight"):
            stored[name] = values[name] = weight
            continue
        group = next((size for size in (64, 16, 4) if weight.shape[1] % size == 0), 0)
        parts, values[name] = write_kernel(weight, scale="kernels", group=group * with_rotation)
        stored |= {f"{name.removesuffix('weight')}{part}": tensor.contiguous()
                   for part, tensor in parts.items()}
    return stored, values
