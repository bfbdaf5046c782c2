"""A model to a file of packed weights, one weight at a time: read, patched, packed, looked at once
more and written.

In memory are at most two dense slices of one weight and what the packing of a slice needs, unless a
patch can only be applied to a whole weight; and, with a calibration, all of the layers packed by
it.

A change of a weight that was rounded before may be swallowed by the steps of the type it is packed
to: the values lie on those steps already. Where all of it is asked for, it is enlarged until what
arrives of it is whole; where even Q8_0 swallows it, values between two steps go to either, each as
often as it is near.
"""
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...ops.format import FORMATS, FormatError, TooLargeError
from ...ops.packed_layout import is_packed
from ...ops.quantize import pack_tensor
from ...ops.quantize.relative_error import RelativeError, float_values
from ...ops.quantize.second_moments import SecondMoments
from ...ops.row_slicing import join_rows
from ...ops.stochastic_rounding import stochastic_round, stochastic_round_to_integers
from ..files.container import PLAIN_DTYPES, nbytes_of, safe_repr
from ..files.gguf_writer import gguf_writer
from ..files.safetensors_writer import safetensors_writer
from ..sizes import size_text
from .calibration.sequential import SequentialCalibration
from .lora_retention import LoraRetention, dot
from .planning.file_plan import FilePlan, plain_type, written_name
from .planning.packing_rules import bits_per_value, with_fallback
from .planning.plan import DIGITS, Plan
from .source import SaveError, Weight

SLICE_VALUES = 1 << 24  # of a weight that are in float32 at a time
ALIGNMENT = 32  # bytes that a tensor may take more in a file than its own
WHOLE = 0.005  # a change whose share differs from 1 by no more is whole
MAX_ENLARGED = 2.0  # factor of a change
ATTEMPTS = 3
FINER, HALF = "Q8_0", "F16"  # what a weight takes whose change does not arrive whole even then
MAX_NOTES = 5  # on single weights


@dataclass(frozen=True)
class Saved:
    """A file that was written.

    types: name -> type, as it came out. table: of these. notes: what of the LoRAs has arrived and
    what people should know.
    """

    path: Path
    nbytes: int
    seconds: float
    types: dict[str, str]
    table: str
    notes: list[str]

    def __str__(self) -> str:
        return f"{self.path}: {size_text(self.nbytes, DIGITS)} in {self.seconds:.0f} s"

    @property
    def text(self) -> str:
        """All of it in short lines, as the node shows them."""
        size = f"{size_text(self.nbytes, DIGITS)}, written in {self.seconds:.0f} s"
        return "\n".join([self.path.name, size, self.table, *self.notes])


def save(plan: FilePlan, track: Callable[[list, list[int]], Iterable] = lambda names, sizes: names,
         calibration: SequentialCalibration | None = None) -> Saved:
    """Write a file that was planned: whole under its name, or not at all.

    Args:
        plan: of the file.
        track: goes over the names, with the values of each, in place of a plain loop; what it
            raises ends the work.
        calibration: of the source's model. Its linear layers are then packed first, each so that it
            makes up for the errors before it, and are in memory at once, packed.

    Raises:
        SaveError: where a weight has no numbers, or cannot be packed.
        WriteError: where the file cannot be written.
        WeightFileError: where a file that weights are read from is written to meanwhile.
    """
    source, packer = plan.source, WeightPacker(plan, calibration)
    packed = {}
    if calibration is not None:
        names = [name for name in calibration.order if plan.types[name] in FORMATS]
        for name in track(names, [source.weights[name].values for name in names]):
            source.guard()
            packed[name] = packer.pack_in_sequence(name)
            source.drop_pages()
    open_writer = safetensors_writer if plan.is_safetensors else gguf_writer
    with open_writer(plan.path, plan.tensors, plan.metadata, plan.options.overwrite) as writer:
        sizes = [max(1, weight.values) for weight in source.weights.values()]
        for name in track(list(source.weights), sizes):
            source.guard()
            type_name, pieces = packed.pop(name, None) or packer.pack(source.weights[name])
            writer.write(written_name(name), type_name, pieces)
            source.drop_pages()
        source.guard()
    return Saved(plan.path, plan.path.stat().st_size, time.monotonic() - plan.started, packer.types,
                 Plan(packer.types).text(source.shapes), [*packer.report_lines(), *plan.notes])


@dataclass
class _Attempt:
    """A weight in one type.

    pieces: of rows, on the CPU; None where the type cannot hold the values. swallows: whether a
    part of its change does not arrive. retention: what its rows add to the sums of `LoraRetention`.
    """

    pieces: list[torch.Tensor] | None = None
    swallows: bool = False
    retention: list[torch.Tensor] = field(default_factory=list)


class WeightPacker:
    """Makes what is written of each weight of a plan, and collects what people are told about it.

    types: name -> type, as it came out. nbytes: that the file takes at most with these.
    """

    def __init__(self, plan: FilePlan, calibration: SequentialCalibration | None = None):
        self.plan = plan
        self.source = plan.source
        self.calibration = calibration
        self.must_survive = plan.must_survive
        self.allow_finer = plan.max_bytes is None and not plan.is_safetensors
        self.nbytes = plan.nbytes
        self.types: dict[str, str] = {}
        self.copied = 0
        self.notes: list[str] = []
        self.retention = LoraRetention(weight.patches for weight in self.source.weights.values())

    def pack(self, weight: Weight) -> tuple[str, list[torch.Tensor]]:
        """(type, pieces of rows on the CPU) of a weight. Raises SaveError."""
        if not weight.is_number:
            return self._as_it_is(weight)
        type_name = self.types[weight.name] = self.plan.types[weight.name]
        if weight.is_whole and not weight.patches and weight.held_as == type_name:
            self.copied += 1
            tensor = weight.as_held()
            if not is_packed(tensor):
                _reject_bad_values(tensor, weight)
            return type_name, [tensor]
        attempt = self._attempt(weight, type_name)
        if (
            attempt.swallows
            and self.allow_finer
            and bits_per_value(type_name) < bits_per_value(FINER)
        ):
            finer = with_fallback(FINER, weight.shape, HALF)
            self.notes.append(
                f"{weight.name} is {finer}: {type_name} would swallow a part of its change.")
            type_name, attempt = finer, self._attempt(weight, finer)
        if attempt.swallows and type_name == FINER:
            attempt = self._attempt(weight, type_name, dither=True)
        if attempt.pieces is None:
            type_name, attempt = self._fall_back(weight, type_name)
        for sums in attempt.retention:
            self.retention.sums += sums
        self.types[weight.name] = type_name
        return type_name, attempt.pieces

    def pack_in_sequence(self, name: str) -> tuple[str, list[torch.Tensor]]:
        """The same of a linear layer's weight, which counts as packed for those that come after
        it."""
        type_name, pieces = self.pack(self.source.weights[name])
        weight = join_rows(pieces)
        if is_packed(weight):
            bias = self.source.weights.get(f"{name.removesuffix('weight')}bias")
            self.calibration.set_packed(name, weight,
                                        None if bias is None else bias.patched(0, bias.shape[0]))
        return type_name, [weight]

    def report_lines(self) -> list[str]:
        """What of the changes has arrived, and what came out otherwise than planned."""
        lines = [f"{self.copied} weights are copied bit for bit."] if self.copied else []
        lines += map(str, self.retention.shares())
        lines += self.notes[:MAX_NOTES]
        if len(self.notes) > MAX_NOTES:
            lines.append(f"{len(self.notes) - MAX_NOTES} more weights came out finer than planned.")
        return lines

    def _as_it_is(self, weight: Weight) -> tuple[str, list[torch.Tensor]]:
        tensor = weight.as_held()
        if not self.plan.is_safetensors and tensor.dtype not in PLAIN_DTYPES.values():
            tensor = tensor.view(torch.int8)
        return plain_type(weight, self.plan.is_safetensors), [tensor]

    def _fall_back(self, weight: Weight, type_name: str) -> tuple[str, _Attempt]:
        """(type, the weight in it) for values that do not fit into `type_name`.

        The 16 bits of its source; BF16 has room for almost all, F32 for the rest; and where the
        size of the file has none for those, a smaller type may do. Raises SaveError where none
        does.
        """
        max_bytes, bits = self.plan.max_bytes, bits_per_value(type_name)
        smaller = [] if max_bytes is None else [with_fallback(FINER, weight.shape, "BF16")]
        for other in dict.fromkeys((weight.half, "BF16", *smaller, "F32")):
            nbytes = self._nbytes_with(weight, type_name, other)
            is_larger = bits_per_value(other) > bits
            if (
                max_bytes is None
                or bits_per_value(other) == bits
                or (is_larger
                and nbytes <= max_bytes)
            ):
                attempt = self._attempt(weight, other)
                if attempt.pieces is not None:
                    self.notes.append(
                        f"{weight.name} is {other}: its values do not fit into {type_name}.")
                    self.nbytes = nbytes
                    return other, attempt
        nbytes = self._nbytes_with(weight, type_name, "BF16")
        raise SaveError(
            f"The values of {safe_repr(weight.name)} do not fit into {type_name}, and with them in"
            f" BF16 the file takes {size_text(nbytes, DIGITS)}, which is more than"
            f" {size_text(max_bytes, DIGITS)}. Choose one type in place of a size.")

    def _nbytes_with(self, weight: Weight, type_name: str, other: str) -> int:
        """That the file takes at most with a weight in another type than planned."""
        more = nbytes_of(other, weight.shape) - nbytes_of(type_name, weight.shape)
        padding = ALIGNMENT if bits_per_value(other) > bits_per_value(type_name) else 0
        return self.nbytes + more + padding

    def _moments(self, weight: Weight, type_name: str) -> SecondMoments | None:
        """What to pack a weight by. A change that is to arrive whole leaves no room for making up
        for other errors."""
        moments, sensitivity = None, self.plan.options.sensitivity
        if (
            type_name not in PLAIN_DTYPES
            and self.calibration is not None
            and weight.name not in self.must_survive
        ):
            moments = self.calibration.moments(weight.name)
        if moments is None and sensitivity is not None:
            moments = sensitivity.moments(weight.name)
        return moments

    def _attempt(self, weight: Weight, type_name: str, dither: bool = False) -> _Attempt:
        attempt, relative_error = _Attempt([]), RelativeError()
        moments = self._moments(weight, type_name)
        slice_values = SLICE_VALUES if moments is None else max(SLICE_VALUES, weight.values)
        for start, stop in weight.slices(slice_values):
            held, changes, values = self._patched(weight, start, stop)
            _reject_bad_values(values, weight)
            piece = self._piece(values, weight, type_name, moments, dither)
            if piece is None:
                return _Attempt()
            if changes and not dither and weight.name in self.must_survive:
                piece, swallows = self._enlarge(
                    piece, held, values - held,
                    lambda values: self._piece(values, weight, type_name, moments))
                attempt.swallows = attempt.swallows or swallows
            attempt.pieces.append(piece)
            if changes:
                attempt.retention.append(
                    self.retention.measure(held, changes, float_values(piece), start == 0))
            relative_error.add(values, piece)
        return attempt if relative_error.is_small else _Attempt()

    def _patched(
            self, weight: Weight, start: int, stop: int
    ) -> tuple[torch.Tensor | None, Sequence[tuple[int, torch.Tensor]], torch.Tensor]:
        """(what is held, [(number of the change, what it adds)], the patched values) of some rows,
        float32."""
        if not weight.patches:
            return None, [], weight.patched(start, stop)
        held = weight.read(start, stop)
        values, changes = held.clone(), []
        for number, patches in self.retention.groups(weight.patches):
            before = values.clone()
            values = weight.patched(start, stop, patches, values)
            if values.shape == before.shape:
                changes.append((number, values - before))
        return held, changes if values.shape == held.shape else [], values

    @staticmethod
    def _enlarge(piece: torch.Tensor, held: torch.Tensor, change: torch.Tensor,
                 pack: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """(rows in which a change arrives whole, or the most that can be had of it, whether that is
        less)."""
        power, factor = dot(change, change), 1.0
        for attempt in range(ATTEMPTS + 1):
            share = dot(float_values(piece) - held, change) / power if power else 1.0
            is_largest = factor == MAX_ENLARGED and share < 1
            if abs(share - 1) <= WHOLE or attempt == ATTEMPTS or is_largest:
                return piece, abs(share - 1) > 2 * WHOLE
            factor = min(factor / max(share, 0.1), MAX_ENLARGED)
            piece = pack(held + factor * change)

    def _piece(self, values: torch.Tensor, weight: Weight, type_name: str,
               moments: SecondMoments | None, dither: bool = False) -> torch.Tensor | None:
        """Rows in a type, on the CPU; None where it cannot hold them. dither: only where the type
        is FINER."""
        if type_name in PLAIN_DTYPES:
            dtype = PLAIN_DTYPES[type_name]
            # A change below half a step of 16 bits would be gone, rounded to the nearest.
            piece = stochastic_round(values.clone(), dtype) if weight.patches else values.to(dtype)
            return piece.cpu() if piece.isfinite().all() else None
        device, packed_format = self.source.device, FORMATS[type_name]
        try:
            if dither:
                return pack_tensor(_at_steps(values).to(device), packed_format,
                                   reference=True).to("cpu")
            options = {} if moments is None else {"moments": moments}
            return pack_tensor(values.to(device), packed_format, **options).to("cpu")
        except TooLargeError:
            return None
        except FormatError as error:
            raise SaveError(
                f"{safe_repr(weight.name)} cannot be packed to {type_name}: {error}") from error


def _at_steps(values: torch.Tensor) -> torch.Tensor:
    """Values that Q8_0 holds exactly, of each one of the two nearest, so that the mean of many
    keeps a change below a step.

    values: float32, rows that blocks of 32 divide.
    """
    blocks = values.reshape(-1, 32)
    largest, index = blocks.abs().max(1, keepdim=True)
    step = (largest / 127).half().float()
    codes = stochastic_round_to_integers(blocks, step).clamp_(-127, 127)
    # by which the format finds the step again
    codes.scatter_(1, index, blocks.gather(1, index).sign() * 127)
    return torch.where(step > 0, codes * step, 0.0).view(values.shape)


def _reject_bad_values(values: torch.Tensor, weight: Weight):
    """Raise SaveError for values that are no numbers."""
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        what = "with its patches it has" if weight.patches else "it has"
        raise SaveError(
            f"{safe_repr(weight.name)} cannot be saved: {what} NaN or infinite values. Get the"
            " model again, or take off what changes it.")
