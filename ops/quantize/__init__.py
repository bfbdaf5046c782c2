"""Packing floats: a weight in, the bytes of a format out.

`ops.grid_search` searches the codes and scales of least error for every format that has a `Grid`;
formats without one are packed by the plain arithmetic of their reference, and so is every format
that has such arithmetic, when asked for.
"""
import math

import torch

from ..format import Format, FormatError, TooLargeError
from ..packed_layout import packed_tensor
from ..packed_tensor import PackedTensor
from .error_feedback import pack_with_feedback
from .grid_fit import Search, best_fit, kernel_for
from .method_choice import pick_lower_error
from .parallel_slices import parallel_slices
from .second_moments import SecondMoments

# Values packed at a time, on a CPU by each thread: there the temporaries stay in the cache.
# Elsewhere they stay below 300 MB.
CPU_SLICE_VALUES = 1 << 17
DEVICE_SLICE_VALUES = 1 << 22
# Above this many levels, scales that just reach the peaks are within 0.3 dB of the best, and ten
# times as fast.
FINE_LEVELS = 128
# Up to so many levels, errors of large values count more: with equal weights the error of the
# weights is smaller, but that of a layer's outputs larger. Where importance was measured, only with
# the fewest.
COARSE_LEVELS = 16
COARSEST_LEVELS = 8


def can_pack(packed_format: type[Format]) -> bool:
    return packed_format.grid is not None or _has_reference(packed_format)


def _has_reference(packed_format: type[Format]) -> bool:
    return packed_format.pack.__func__ is not Format.pack.__func__


@torch.no_grad()
def pack_tensor(weight: torch.Tensor, packed_format: type[Format],
                moments: SecondMoments | None = None, importance: torch.Tensor | None = None,
                reference: bool = False) -> PackedTensor:
    """A weight packed in a format, shown as float32, on the weight's device.

    weight: any float dtype, (..., K), rows that the format's blocks divide; of NF4 and FP4 any
    shape. importance: float (K,), the weight of a squared error in each column; None where nothing
    was measured. moments: of the layer's inputs; with them in place of `importance` the weight is
    packed with error feedback, where a format has a grid, if that serves tokens held out better.
    reference: whether to take the plain arithmetic of the format's reference, bit for bit, in place
    of the search.

    Works in slices, so that what it needs beside the weight and the result is bounded, whatever the
    weight's size. A part of a weight gets the blocks it has in the whole. Values that are too small
    for the format become zeros. Raises TooLargeError for values that are too large for it, and
    FormatError for such as are not finite, shapes that do not divide, formats that nothing packs,
    and `reference` where there is none.
    """
    if not can_pack(packed_format) or (reference and not _has_reference(packed_format)):
        raise FormatError(
            f"Nothing here packs"
            f" {packed_format.__name__}{' by plain arithmetic' if reference else ''}."
        )
    grid, length = packed_format.grid, packed_format.block_length
    if not packed_format.scales_apart:
        # raises where blocks do not divide the rows
        packed_format.packed_shape(tuple(weight.shape))
    plain = grid is None or reference
    quick = not plain and importance is None and len(grid.levels) > FINE_LEVELS
    emphasis = not plain and len(grid.levels) <= (
        COARSE_LEVELS if importance is None else COARSEST_LEVELS
    )
    run = None if plain or quick else kernel_for(packed_format, weight.device)
    if importance is not None:
        importance = _usable(importance, weight)
    elif moments is not None and not plain and weight.shape[1:].numel() % length == 0:
        # refuses values too large, too
        plain_search = pack_tensor(weight, packed_format, importance=moments.importance)
        return pick_lower_error(weight,
                                [pack_with_feedback(weight, packed_format, moments), plain_search],
                                moments)
    flat = weight.reshape(-1)
    if not len(flat):
        raise FormatError(f"A weight of shape {tuple(weight.shape)} has no values to pack.")
    sizes = _sizes(packed_format, len(flat))
    outputs = [torch.empty(sizes[0], dtype=torch.uint8, device=weight.device)]
    if packed_format.scales_apart:
        outputs.append(torch.empty(sizes[1], dtype=torch.float32, device=weight.device))
    step = (
        max(1, (CPU_SLICE_VALUES if weight.device.type == "cpu" else DEVICE_SLICE_VALUES) // length)
        * length
    )

    def pack_slice(start: int):
        values = flat[start:start + step].float()
        _check(values, packed_format)
        if len(values) % length:
            values = torch.nn.functional.pad(values, (0, -len(values) % length))
        values = values.view(-1, length)
        if plain:
            parts = packed_format.pack(values)
        elif quick:
            parts = packed_format.encode(Search(grid, values.device).fit_quickly(values))
        else:
            fit = best_fit(packed_format, values, _weights(values, start, importance), emphasis,
                           run)
            parts = packed_format.encode(fit)
        parts = parts if isinstance(parts, tuple) else (parts,)
        for output, part, size in zip(outputs, parts, (packed_format.block_bytes, 1)):
            first = start // length * size
            output[first:first + part.numel()] = part.view(-1)[:len(output) - first]

    parallel_slices(pack_slice, range(0, len(flat), step), weight.device)
    return packed_tensor(packed_format, outputs[0], weight.shape,
                         scale=outputs[1] if len(outputs) > 1 else None)


def _sizes(packed_format: type[Format], values: int) -> tuple[int, int]:
    """Bytes of a weight of so many values, and scales that are kept apart. The last block of NF4
    may be short."""
    return -(-values * packed_format.block_bytes // packed_format.block_length), -(
        -values // packed_format.block_length
    )


def _check(values: torch.Tensor, packed_format: type[Format]):
    lowest, highest = values.aminmax()
    peak = max(-float(lowest), float(highest))
    if not math.isfinite(peak) or math.isnan(lowest):
        raise FormatError("The weight holds NaN or infinite values.")
    if packed_format.plain_dtype is not None:
        largest = torch.finfo(packed_format.plain_dtype).max
    else:
        largest = packed_format.grid.largest if packed_format.grid else packed_format.largest
    if peak > largest:
        raise TooLargeError(
            f"The weight holds values up to {peak:g}; {packed_format.__name__} holds {largest:g}"
            " at most."
        )


def _usable(importance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Importance with a mean of 1, float32 on the weight's device, nowhere zero: such columns would
    get any values."""
    importance = importance.to(weight.device, torch.float32)
    if (
        importance.shape != weight.shape[-1:]
        or not bool(importance.isfinite().all())
        or bool((importance < 0).any())
    ):
        raise FormatError(
            f"Importance of shape {tuple(importance.shape)} does not fit a weight of shape"
            f" {tuple(weight.shape)}, or is not finite and at least 0 everywhere.")
    mean = importance.mean()
    return (importance / mean).clamp_(min=1e-4) if mean > 0 else torch.ones_like(importance)


def _weights(values: torch.Tensor, start: int,
             importance: torch.Tensor | None) -> torch.Tensor | None:
    """Weights of squared error of blocks, (n, length), whose first value has the index `start` in
    the weight."""
    if importance is None:
        return None
    index = torch.arange(start, start + values.numel(), device=values.device)
    return importance[index % len(importance)].view_as(values)
