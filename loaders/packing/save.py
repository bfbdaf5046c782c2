"""Saves a model as a file of packed weights: reads, patches, packs, checks and writes each weight.

In memory are at most two dense slices of one weight and what packing a slice needs, unless a patch
applies only to a whole weight; for types of ComfyUI's own that have one scale for a weight, its
values and what packing them needs.

A small change of a quantized weight may be lost in rounding, since the weight's values lie on the
steps of the type already. Where it is to arrive whole, it is enlarged until it does. Where a part
is lost even in Q8_0, values are rounded stochastically.
"""
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ...ops.formats.base import FormatError, TooLargeError
from ...ops.packing.pack_types import TYPES, RowPackType, pack_type
from ...ops.packing.packed_pieces import PackedPieces
from ...ops.packing.relative_error import float_values
from ...ops.quantize.row_source import RowSource
from ...ops.stochastic_rounding import stochastic_round, stochastic_round_to_integers
from ...ops.tensor.packed_layout import is_packed
from ...ops.tensor.row_slicing import take_rows
from ..byte_sizes import size_text
from ..container.weight_file import PLAIN_DTYPES, safe_repr
from ..files.gguf_header import DEFAULT_ALIGNMENT
from ..files.gguf_writer import gguf_writer
from ..files.safetensors_writer import safetensors_writer
from ..packing_rules import with_fallback
from .layer_losses import RESULT, WEIGHTS, layer_lines, loss_sentences
from .lora_retention import LoraRetention, dot
from .planning.file_plan import FilePlan, errors_of_result, plain_type
from .planning.plan import DIGITS, Plan
from .save_report import Saved
from .source import BLOCK_ROWS, SaveError, Weight

SLICE_VALUES = 1 << 24  # values of a weight in float32 at a time
# How a change is enlarged until it arrives whole: the share of it that arrives may differ from 1 by
# WHOLE, the factor is at most MAX_ENLARGED, and it is corrected ATTEMPTS times.
WHOLE = 0.005
MAX_ENLARGED = 2.0
ATTEMPTS = 3
FINER, HALF = "Q8_0", "F16"  # the types of a weight whose enlarged change does not arrive whole
MAX_NOTES = 5  # on single weights


def save(plan: FilePlan,
         track: Callable[[list, list[int]], Iterable] = lambda names, sizes: names) -> Saved:
    """Writes a planned file, whole under its name or not at all.

    Args:
        plan: of the file.
        track: iterates over names and reports progress by their sizes; what it raises ends the
            work.

    Raises:
        SaveError: where a weight has NaN or infinite values, or cannot be packed.
        WriteError: where the file cannot be written.
        WeightFileError: where a file that weights are read from changes meanwhile.
    """
    source, packer = plan.source, WeightPacker(plan)
    open_writer = safetensors_writer if plan.is_safetensors else gguf_writer
    with open_writer(plan.path, plan.tensors, plan.metadata, plan.options.overwrite,
                     plan.options.mode) as writer:
        sizes = [max(1, weight.values) for weight in source.weights.values()]
        for name in track(list(source.weights), sizes):
            source.guard()
            type_name, pieces = packer.pack(source.weights[name])
            writer.write(plan.names[name], type_name, pieces)
            source.drop_pages()
        source.guard()
    written, losses = Plan(packer.types), packer.loss_lines()
    return Saved(plan.path, plan.path.stat().st_size,
                 sorted({safe_repr(Path(path).name) for path in source.paths}),
                 time.monotonic() - plan.started, packer.types,
                 written.text(source.shapes), written.shares(source.shapes), losses,
                 [*losses, *packer.note_lines(), *plan.notes],
                 layer_lines(packer.losses(), packer.loss_kind))


class _Packed(PackedPieces):
    """A weight packed in one type, whether a part of its change does not arrive, and what its rows
    add to the sums of `LoraRetention`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loses_change = False
        self.retention: list[torch.Tensor] = []


class WeightPacker:
    """Packs the weights of a plan and collects notes for people.

    types: name -> type, as packed. nbytes: of the file with these types, at most. lost: of what
    the losses are, which is of the result where a measurement has costs and each layer is packed
    for its own inputs.
    """

    def __init__(self, plan: FilePlan):
        self.plan = plan
        self.source = plan.source
        self.must_survive = plan.must_survive
        self.allow_finer = plan.max_bytes is None and not plan.is_safetensors
        self.nbytes = plan.nbytes
        self.types: dict[str, str] = {}
        self.copied = 0
        measured = plan.options.sensitivity
        self.loss_kind = measured.loss_kind if measured else WEIGHTS
        self._losses: dict[str, float] = {}
        self.notes: list[str] = []
        self.retention = LoraRetention(weight.patches for weight in self.source.weights.values())

    def pack(self, weight: Weight) -> tuple[str, list[torch.Tensor]]:
        """Packs a weight in the type of the plan, or in one that can hold its values and changes.

        Returns:
            The type, and pieces of rows on the CPU.

        Raises:
            SaveError: where no type can hold it.
        """
        if not weight.is_number:
            return self._copy_plain(weight)
        type_name = self.types[weight.name] = self.plan.types[weight.name]
        if weight.is_copied(type_name):
            self.copied += 1
            tensor = weight.stored_tensor()
            if not is_packed(tensor):
                _reject_bad_values(tensor, weight)
            return type_name, [tensor]
        packed = self._try_pack(weight, type_name)
        is_coarser = pack_type(type_name).bits_per_value() < TYPES[FINER].bits_per_value()
        if packed and packed.loses_change and self.allow_finer and is_coarser:
            finer = with_fallback(FINER, weight.shape, HALF)
            self.notes.append(
                f"{weight.name} is {finer}: {type_name} would lose a part of its change.")
            type_name, packed = finer, self._try_pack(weight, finer)
        if packed and packed.loses_change and type_name == FINER:
            packed = self._try_pack(weight, type_name, dither=True)
        if packed is None:
            type_name, packed = self._fall_back(weight, type_name)
        for sums in packed.retention:
            self.retention.sums += sums
        if type_name not in PLAIN_DTYPES and packed.error.error:
            share, output = packed.error.share, packed.output_error
            self._losses[weight.name] = share if output is None else output
        self.types[weight.name] = type_name
        return type_name, packed.pieces

    def losses(self) -> dict[str, float]:
        """Returns name -> what each packed weight loses, for `layer_losses`."""
        if self.loss_kind == RESULT:
            return errors_of_result(self.source, self.types, self.plan.options)
        return self._losses

    def loss_lines(self) -> list[str]:
        """Returns sentences on what is lost, and on what arrived of the changes."""
        lines = [f"{self.copied} weights are copied bit for bit."] if self.copied else []
        values = {name: weight.values for name, weight in self.source.weights.items()}
        lines += loss_sentences(self.losses(), self.loss_kind, values)
        return [*lines, *map(str, self.retention.shares())]

    def note_lines(self) -> list[str]:
        """Returns sentences on unplanned types."""
        lines = self.notes[:MAX_NOTES]
        if len(self.notes) > MAX_NOTES:
            lines.append(
                f"{len(self.notes) - MAX_NOTES} more weights are in finer types than planned.")
        return lines

    def _copy_plain(self, weight: Weight) -> tuple[str, list[torch.Tensor]]:
        tensor = weight.stored_tensor()
        if not self.plan.is_safetensors and tensor.dtype not in PLAIN_DTYPES.values():
            tensor = tensor.view(torch.int8)
        return plain_type(weight, self.plan.is_safetensors), [tensor]

    def _fall_back(self, weight: Weight, type_name: str) -> tuple[str, _Packed]:
        """Returns a type that holds a weight which `type_name` does not, and its packed form.

        Tries the 16-bit type of its source, BF16, which holds almost all values, and F32. In a file
        of limited size a type of 8 bits comes before F32. Raises SaveError where the size has no
        room for a type that holds the values.
        """
        max_bytes, bits = self.plan.max_bytes, pack_type(type_name).bits_per_value()
        smaller = [] if max_bytes is None else [with_fallback(FINER, weight.shape, "BF16")]
        if self.plan.is_safetensors:
            smaller = [each for each in self.plan.options.row_types
                       if TYPES[each].bits_per_value() >= 8 and TYPES[each].takes(weight.shape)]
        too_large = None  # the first type that the size leaves no room for
        for other in dict.fromkeys((weight.half, "BF16", *smaller, "F32")):
            nbytes = self._nbytes_with(weight, type_name, other)
            other_bits = pack_type(other).bits_per_value()
            is_allowed = (
                max_bytes is None
                or other_bits == bits
                or (other_bits > bits and nbytes <= max_bytes)
            )
            if not is_allowed:
                is_wider = other in ("BF16", "F32") and other_bits > bits
                too_large = too_large or (other if is_wider else None)
                continue
            packed = self._try_pack(weight, other)
            if packed is not None:
                self.notes.append(
                    f"{weight.name} is {other}: its values do not fit into {type_name}.")
                self.nbytes = nbytes
                return other, packed
        other = too_large or "BF16"
        nbytes = self._nbytes_with(weight, type_name, other)
        limit = "" if max_bytes is None else f", which is more than {size_text(max_bytes, DIGITS)}"
        raise SaveError(
            f"The values of {safe_repr(weight.name)} do not fit into {type_name}, and with them in"
            f" {other} the file takes {size_text(nbytes, DIGITS)}{limit}. Choose one type in place"
            " of a size.")

    def _nbytes_with(self, weight: Weight, type_name: str, other: str) -> int:
        """Returns the bytes of the file, at most, with a weight in another type than planned."""
        before, after = pack_type(type_name), pack_type(other)
        padding = DEFAULT_ALIGNMENT if after.bits_per_value() > before.bits_per_value() else 0
        return self.nbytes + after.nbytes(weight.shape) - before.nbytes(weight.shape) + padding

    def _try_pack(self, weight: Weight, type_name: str, dither: bool = False) -> _Packed | None:
        """Packs a weight in a type, None where the type cannot hold its values.

        dither: whether values are rounded stochastically, for FINER only.
        """
        measured, planned = self.plan.options.sensitivity, pack_type(type_name)
        moments = None if measured is None else measured.moments(weight.name)
        packed = _Packed(planned, moments, self.source.device,
                         self.loss_kind not in (RESULT, WEIGHTS))
        is_per_tensor = isinstance(planned, RowPackType) and planned.is_per_tensor
        try:
            if is_per_tensor and weight.name not in self.must_survive:
                self._pack_whole(weight, packed)
            else:
                self._pack_slices(weight, packed, moments is not None or is_per_tensor, dither)
        except TooLargeError:
            return None
        except FormatError as error:
            raise SaveError(
                f"{safe_repr(weight.name)} cannot be packed to {type_name}: {error}") from error
        return packed if packed.is_held else None

    def _pack_slices(self, weight: Weight, packed: _Packed, is_whole: bool, dither: bool):
        """Packs a weight by slices of rows, or with `is_whole` in one.

        Raises:
            TooLargeError: The type cannot hold its values.
        """

        def pack(values: torch.Tensor) -> torch.Tensor:
            if dither:
                return packed.pack(_round_to_q8_0(values), is_plain=True)
            if weight.patches and packed.pack_type.dtype is not None:
                # Rounding to the nearest would lose a change below half a step of 16 bits.
                values = stochastic_round(values.clone(), packed.pack_type.dtype)
            return packed.pack(values)

        for start, stop in weight.slices(
                max(SLICE_VALUES, weight.values) if is_whole else SLICE_VALUES):
            base, changes, values = self._patched(weight, start, stop)
            _reject_bad_values(values, weight)
            piece = pack(values)
            if changes and not dither and weight.name in self.must_survive:
                piece, loses_change = self._enlarge(piece, base, values - base, pack)
                packed.loses_change = packed.loses_change or loses_change
            if changes:
                packed.retention.append(
                    self.retention.measure(base, changes, float_values(piece), start == 0))
            packed.add(values, piece)

    def _pack_whole(self, weight: Weight, packed: _Packed):
        """Packs a weight of one scale in one piece.

        Only slices of it are dense, unless a patch applies only to a whole weight.

        Raises:
            TooLargeError: The type cannot hold its values.
        """
        slices = weight.slices(SLICE_VALUES)
        source = self._rows_of(weight)
        if len(slices) == 1:
            source = RowSource.of(source.read(0, weight.shape[0]))
        piece = packed.pack(source)
        packed.add(source, piece)
        for start, stop in slices if weight.patches else ():
            base, changes, _ = self._patched(weight, start, stop)
            if changes:
                rows = float_values(take_rows(piece, slice(start, stop)))
                packed.retention.append(self.retention.measure(base, changes, rows, start == 0))

    def _rows_of(self, weight: Weight) -> RowSource:
        """Returns a weight with its patches as a source of float32 rows; bad values raise."""
        device = self.source.device

        def read(start: int, stop: int) -> torch.Tensor:
            first = start // BLOCK_ROWS * BLOCK_ROWS
            last = min(weight.shape[0], -(-stop // BLOCK_ROWS) * BLOCK_ROWS)
            values = self._patched(weight, first, last)[2][start - first:stop - first]
            _reject_bad_values(values, weight)
            return values.to(device)

        return RowSource(weight.shape, read, device)

    def _patched(
            self, weight: Weight, start: int, stop: int
    ) -> tuple[torch.Tensor, Sequence[tuple[int, torch.Tensor]], torch.Tensor]:
        """Returns some rows of a weight with and without its patches, float32, on the CPU.

        Returns:
            The rows without patches, (number of a change, what it adds), the rows with patches. No
            changes where patches replace the rows by ones of another shape.
        """
        base = weight.read(start, stop).cpu()
        if not weight.patches:
            return base, [], base
        values, changes = base.clone(), []
        for number, patches in self.retention.groups(weight.patches):
            before = values.clone()
            values = weight.patched(start, stop, patches, values)
            if values.shape == before.shape:
                changes.append((number, values - before))
        return base, changes if values.shape == base.shape else [], values

    @staticmethod
    def _enlarge(
            piece: torch.Tensor, base: torch.Tensor, change: torch.Tensor,
            pack: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, bool]:
        """Enlarges a change, float32, until it arrives whole in packed rows.

        piece: `base` with the change, packed by `pack`; base: the rows without it, float32.

        Returns:
            The rows, packed, and whether some of the change is lost.
        """
        power, factor, attempt = dot(change, change), 1.0, 0
        best, nearest = piece, math.inf
        while True:
            share = dot(float_values(piece) - base, change) / power if power else 1.0
            if abs(share - 1) < nearest:
                best, nearest = piece, abs(share - 1)
            is_largest = factor == MAX_ENLARGED and share < 1
            if abs(share - 1) <= WHOLE or attempt == ATTEMPTS or is_largest:
                return best, nearest > 2 * WHOLE
            factor = min(factor / max(share, 0.1), MAX_ENLARGED)
            piece = pack(base + factor * change)
            attempt += 1


def _round_to_q8_0(values: torch.Tensor) -> torch.Tensor:
    """Rounds values stochastically to ones that Q8_0 holds exactly.

    The mean of many values then keeps a change that is smaller than a step.

    values: float32, rows that blocks of 32 divide.
    """
    blocks = values.reshape(-1, 32)
    largest, index = blocks.abs().max(1, keepdim=True)
    step = (largest / 127).half().float()
    codes = stochastic_round_to_integers(blocks, step).clamp_(-127, 127)
    # The format derives the step from the largest value, so that one keeps the largest code.
    codes.scatter_(1, index, blocks.gather(1, index).sign() * 127)
    return torch.where(step > 0, codes * step, 0.0).view(values.shape)


def _reject_bad_values(values: torch.Tensor, weight: Weight):
    """Raises SaveError for NaN and infinite values."""
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        what = "with its patches it has" if weight.patches else "it has"
        raise SaveError(
            f"{safe_repr(weight.name)} cannot be saved: {what} NaN or infinite values. Get the"
            " model again, or remove what changes it.")
