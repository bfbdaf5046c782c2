"""Packs a weight into the bytes of a format.

For formats with a `Grid`, `grid_search` searches the codes and scales of least error. Formats
without one are packed by the plain arithmetic of their reference, and so is every other format that
has such arithmetic, on request.
"""
import torch

from .. import kernels
from ..formats.base import Fit, Format, FormatError, TooLargeError
from ..quantize.finite_peak import finite_peak
from ..quantize.grid_search import Search
from ..quantize.parallel_slices import parallel_slices
from ..quantize.second_moments import SecondMoments
from ..tensor.packed_layout import packed_tensor
from ..tensor.packed_tensor import PackedTensor
from .error_feedback import pack_with_feedback
from .method_choice import pick_lower_error

# Values in a slice. On a CPU, where each thread packs a slice, the temporaries stay in the cache;
# on other devices they stay below 300 MB.
CPU_SLICE_VALUES = 1 << 17
DEVICE_SLICE_VALUES = 1 << 22
# See `Search.fit`. 1.5 times as much of each gains 0.03 dB and takes 1.5 times as long.
TRIES, ROUNDS, SWEEPS = 9, 1, 1
# Above this many levels, scales that just reach the peaks are within 0.3 dB of the best and found
# ten times as fast.
FINE_LEVELS = 128
# Up to this many levels, errors of large values count more: equal weights would give a smaller
# error of the weight but a larger one of the output. The second limit is for measured importance.
COARSE_LEVELS = 16
COARSEST_LEVELS = 8


def can_pack(packed_format: Format) -> bool:
    """Whether floats can be packed into a format."""
    return packed_format.grid is not None or _has_reference(packed_format)


def _has_reference(packed_format: Format) -> bool:
    return type(packed_format).pack is not Format.pack


@torch.no_grad()
def pack_tensor(weight: torch.Tensor, packed_format: Format,
                moments: SecondMoments | None = None, importance: torch.Tensor | None = None,
                reference: bool = False) -> PackedTensor:
    """Packs a weight into a format, on the weight's device.

    Works in slices, so that temporaries are bounded for weights of any size. A part of a weight
    gets the same blocks as in the whole. Values that are too small for the format become zeros.

    Args:
        weight: (..., K) of any float dtype. The format's blocks must divide its rows; NF4 and FP4
            take any shape.
        packed_format: The format.
        moments: Of the layer's inputs, for formats with a grid. The weight is packed with error
            feedback, if that gives a smaller output error for the tokens held out.
        importance: float (K,), the weight of a squared error in each column; replaces `moments`.
            None: all equal.
        reference: Whether to use the plain arithmetic of the format's reference, bit for bit,
            instead of the search.

    Returns:
        The packed weight, which shows as float32.

    Raises:
        TooLargeError: A value is too large for the format.
        FormatError: A value is not finite, the blocks do not divide the shape, or the format cannot
            be packed (with `reference`: not by plain arithmetic).
    """
    if not can_pack(packed_format) or (reference and not _has_reference(packed_format)):
        by_reference = " by plain arithmetic" if reference else ""
        raise FormatError(f"{packed_format.name} cannot be packed{by_reference}.")
    grid = None if reference else packed_format.grid  # None: plain arithmetic
    length = packed_format.block_length
    if not packed_format.qparams:
        packed_format.packed_shape(tuple(weight.shape))  # raises if blocks do not divide the rows
    quick = grid is not None and importance is None and len(grid.levels) > FINE_LEVELS
    most_levels = COARSE_LEVELS if importance is None else COARSEST_LEVELS
    emphasis = grid is not None and len(grid.levels) <= most_levels
    # A kernel rounds its sums differently: some blocks differ from torch's, with errors as small.
    run = None if grid is None or quick else kernels.find("pack_blocks", weight.device,
                                                          packed_format, torch.float32)
    if importance is not None:
        importance = _normalized(importance, weight)
    elif moments is not None and grid is not None and weight.shape[1:].numel() % length == 0:
        # first the one that raises for values that are too large
        by_search = pack_tensor(weight, packed_format, importance=moments.importance)
        by_feedback = pack_with_feedback(weight, packed_format, moments)
        return pick_lower_error(weight, [by_feedback, by_search], moments)
    flat = weight.reshape(-1)
    if not len(flat):
        raise FormatError(f"A weight of shape {tuple(weight.shape)} has no values to pack.")
    # the last block of NF4 may be short
    nbytes, blocks = -(-len(flat) * packed_format.block_bytes // length), -(-len(flat) // length)
    outputs = [torch.empty(nbytes, dtype=torch.uint8, device=weight.device)]
    if packed_format.qparams:
        outputs.append(torch.empty(blocks, dtype=torch.float32, device=weight.device))
    slice_values = CPU_SLICE_VALUES if weight.device.type == "cpu" else DEVICE_SLICE_VALUES
    step = max(1, slice_values // length) * length

    def pack_slice(start: int):
        values = flat[start:start + step].float()
        _check_values(values, packed_format)
        if len(values) % length:
            values = torch.nn.functional.pad(values, (0, -len(values) % length))
        values = values.view(-1, length)
        if grid is None:
            parts = packed_format.pack(values)
        elif quick:
            parts = packed_format.encode(Search(grid, values.device).fit_quickly(values))
        else:
            error_weights = _error_weights(values, start, importance)
            if run is None:
                fit = Search(grid, values.device).fit(values, error_weights, TRIES, ROUNDS, SWEEPS,
                                                      emphasis)
            else:
                fit = Fit.empty(grid, len(values), values.device)
                run(packed_format, values.contiguous(), error_weights, fit, TRIES, ROUNDS, SWEEPS,
                    emphasis)
            parts = packed_format.encode(fit)
        parts = parts if isinstance(parts, tuple) else (parts,)
        for output, part, size in zip(outputs, parts, (packed_format.block_bytes, 1)):
            first = start // length * size
            output[first:first + part.numel()] = part.view(-1)[:len(output) - first]

    parallel_slices(pack_slice, range(0, len(flat), step), weight.device)
    return packed_tensor(packed_format, outputs[0], weight.shape,
                         scale=outputs[1] if len(outputs) > 1 else None)


def _check_values(values: torch.Tensor, packed_format: Format):
    peak = finite_peak(values)
    if packed_format.plain_dtype is not None:
        largest = torch.finfo(packed_format.plain_dtype).max
    else:
        largest = packed_format.grid.largest if packed_format.grid else packed_format.largest
    if peak > largest:
        raise TooLargeError(
            f"The weight holds values up to {peak:g}; {packed_format.name} holds {largest:g}"
            " at most."
        )


def _normalized(importance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns importance with a mean of 1 and no zeros, float32, on the weight's device.

    Columns with an importance of zero would get arbitrary values.
    """
    importance = importance.to(weight.device, torch.float32)
    if (
        importance.shape != weight.shape[-1:]
        or not bool(importance.isfinite().all())
        or bool((importance < 0).any())
    ):
        raise FormatError(
            f"Importance of shape {tuple(importance.shape)} does not fit a weight of shape"
            f" {tuple(weight.shape)}, or has negative, NaN or infinite values.")
    mean = importance.mean()
    return (importance / mean).clamp_(min=1e-4) if mean > 0 else torch.ones_like(importance)


def _error_weights(values: torch.Tensor, start: int,
                   importance: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the weights of the squared errors of blocks, (n, length), None for equal ones.

    start: of the blocks' first value in the weight. importance: float32 (K,), or None.
    """
    if importance is None:
        return None
    index = torch.arange(start, start + values.numel(), device=values.device)
    return importance[index % len(importance)].view_as(values)
