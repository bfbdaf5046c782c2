"""Packs weights as K-quants, which the `gguf` package can only unpack.

A row is cut into blocks of 256 values, a block into groups of 16 or 32. For each group several scales are tried; each gives
codes, and the codes the scale (and the offset) of least squared error. Byte layouts: `ops/formats/k_quants.py`.
"""
import numpy as np
import torch

BLOCK = 256


def pack(values: np.ndarray, type_name: str) -> np.ndarray:
    """Packed rows, uint8, of float32 `values` (N, K), with K a multiple of 256."""
    blocks = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(-1, BLOCK)
    packed = torch.cat([PACKERS[type_name](part) for part in blocks.split(8192)])
    return packed.view(*values.shape[:-1], -1).numpy()


def _squares(values: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    return (values - guess).square().sum(-1, keepdim=True)


def _safe(divisor: torch.Tensor) -> torch.Tensor:
    return torch.where(divisor.abs() < 1e-30, 1.0, divisor)


def _slope(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The factor of least squares from codes to values."""
    return (codes * values).sum(-1, keepdim=True) / _safe(codes.square().sum(-1, keepdim=True))


def fit_with_minimum(groups: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum, (..., 1), both at least 0, for value = scale * code - minimum with codes 0 to `largest`."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    span = groups.amax(-1, keepdim=True) - low
    scale, minimum, error = span / largest, -low, torch.full_like(low, torch.inf)
    for stretch in torch.linspace(-1, 1, 21).tolist():
        codes = ((groups - low) * (largest + stretch) / _safe(span)).round().clamp(0, largest)
        # The line of least squares through (code, value)
        mean, middle = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
        slope = _slope(codes - mean, groups - middle)
        offset = slope * mean - middle
        through_zero = _slope(codes, groups)
        slope, offset = torch.where(offset < 0, through_zero, slope), offset.clamp(min=0)
        better = (slope > 0) & ((off := _squares(groups, slope * codes - offset)) < error)
        scale, minimum, error = (torch.where(better, new, old) for new, old in
                                 ((slope, scale), (offset, minimum), (off, error)))
    return scale, minimum


def fit_symmetric(groups: torch.Tensor, lowest: int) -> torch.Tensor:
    """Scale of either sign, (..., 1), for value = scale * code with codes `lowest` (below 0) to -lowest - 1."""
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale, error = peak / lowest, torch.full_like(peak, torch.inf)
    for stretch in torch.linspace(-0.9, 0.9, 19).tolist():
        codes = (groups * (lowest + stretch) / _safe(peak)).round().clamp(lowest, -lowest - 1)
        slope = _slope(codes, groups)
        off = _squares(groups, slope * codes)
        scale, error = torch.where(off < error, slope, scale), torch.minimum(off, error)
    return scale


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().view(torch.uint8)


def _with_minimum(blocks: torch.Tensor, group: int, largest: int, steps: int):
    """Codes (n, 256), scales and minimums in `steps` steps (n, groups), and the two super-scales (n, 1)."""
    groups = blocks.view(len(blocks), -1, group)
    scale, minimum = (part.squeeze(-1) for part in fit_with_minimum(groups, largest))
    supers = [part.amax(-1, keepdim=True).div(steps).half().float() for part in (scale, minimum)]
    scale, minimum = ((part / _safe(above)).round().clamp(0, steps) for part, above in zip((scale, minimum), supers))
    unit, offset = (scale * supers[0]).unsqueeze(-1), (minimum * supers[1]).unsqueeze(-1)
    codes = ((groups + offset) / _safe(unit)).round().clamp(0, largest) * (unit > 0)
    return codes.to(torch.uint8).view(-1, BLOCK), scale.to(torch.uint8), minimum.to(torch.uint8), supers


def _symmetric(blocks: torch.Tensor, lowest: int, lowest_scale: int):
    """Codes from 0 (n, 256), signed scales (n, 16), and the super-scale (n, 1)."""
    groups = blocks.view(len(blocks), -1, 16)
    scale = fit_symmetric(groups, lowest).squeeze(-1)
    peak = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    above = (peak / lowest_scale).half().float()
    scale = (scale / _safe(above)).round().clamp(lowest_scale, -lowest_scale - 1)
    unit = (scale * above).unsqueeze(-1)
    codes = torch.where(unit == 0, 0, groups / _safe(unit)).round().clamp(lowest, -lowest - 1) - lowest
    return codes.to(torch.uint8).view(-1, BLOCK), scale.to(torch.int8), above


def _planes(codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Bytes that hold 8 / bits codes: each run of `width` bytes holds that many runs of `width` codes, low bits first."""
    runs = codes.view(len(codes), -1, 8 // bits, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    return (runs << shifts).sum(2, dtype=torch.uint8).view(len(codes), -1)


def _six_bits(scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minimums of six bits in twelve bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minimums[:, :4] | (minimums[:, 4:] >> 4 << 6)
    return torch.cat([first, second, scales[:, 4:] & 15 | (minimums[:, 4:] << 4)], 1)


def _q2_k(blocks):
    codes, scales, minimums, (d, dmin) = _with_minimum(blocks, 16, 3, 15)
    return torch.cat([scales | minimums << 4, _planes(codes, 2, 32), _half(d), _half(dmin)], 1)


def _q4_k(blocks):
    codes, scales, minimums, (d, dmin) = _with_minimum(blocks, 32, 15, 63)
    return torch.cat([_half(d), _half(dmin), _six_bits(scales, minimums), _planes(codes, 4, 32)], 1)


def _q5_k(blocks):
    codes, scales, minimums, (d, dmin) = _with_minimum(blocks, 32, 31, 63)
    return torch.cat([_half(d), _half(dmin), _six_bits(scales, minimums), _planes(codes >> 4, 1, 32),
                      _planes(codes & 15, 4, 32)], 1)


def _q3_k(blocks):
    codes, scales, d = _symmetric(blocks, -4, -32)
    scales = (scales + 32).to(torch.uint8)
    return torch.cat([_planes(codes >> 2, 1, 32), _planes(codes & 3, 2, 32), _planes(scales & 15, 4, 8),
                      _planes(scales >> 4, 2, 4), _half(d)], 1)


def _q6_k(blocks):
    codes, scales, d = _symmetric(blocks, -32, -128)
    return torch.cat([_planes(codes & 15, 4, 64), _planes(codes >> 4, 2, 32), scales.view(torch.uint8), _half(d)], 1)


PACKERS = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
