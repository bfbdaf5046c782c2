"""One weight at a time: read, patched, packed, and looked at once more before it is written.

A change of a weight that was rounded before may be swallowed by the steps of the type it is packed to: the values lie on those
steps already. Where all of it is asked for, it is enlarged until what arrives of it is whole; where even Q8_0 swallows it,
values between two steps go to either, each as often as it is near.
"""
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import torch

from ...ops.format import FORMATS, FormatError, TooLargeError
from ...ops.packing import pack_tensor
from ...ops.packing.moments import Moments
from ...ops.rounding import dithered, dithered_steps
from ...ops.rows import join_rows
from ...ops.tensor import is_packed
from ..files.container import PLAIN_DTYPES, nbytes_of, shown
from ..files.safetensors_writer import DTYPES
from .block_by_block import InTurn
from .obstacles import SaveError
from ..sizes import size_text
from .plan import DIGITS
from .relative_error import RelativeError, values_of
from .rules import PLAIN_BYTES, fitting
from .shares import Shares, dot
from .source import Source, Weight

SLICE_VALUES = 1 << 24  # of a weight that are in float32 at a time
ALIGNMENT = 32  # bytes that a tensor may take more in a file than its own
WHOLE = 0.005  # a change whose share differs from 1 by no more is whole
MOST_ENLARGED, ATTEMPTS = 2.0, 3
FINER, HALF = "Q8_0", "F16"  # what a weight takes whose change does not arrive whole even then


@dataclass
class _Attempt:
    """A weight in one type. pieces: of rows, on the CPU; None where the type cannot hold the values. swallows: whether a part
    of its change does not arrive. seen: what `Shares.add` takes."""

    pieces: list[torch.Tensor] | None = None
    swallows: bool = False
    seen: list[tuple] = field(default_factory=list)


class Maker:
    """Makes what is written of each weight, and collects what people are told about it."""

    def __init__(self, source: Source, types: Mapping[str, str], sensitivity, whole: Set[str], finer: bool, safetensors: bool,
                 turn: InTurn | None = None, most: int | None = None, nbytes: int = 0):
        """types: planned, by name. whole: names of the weights that were rounded before and whose changes are to arrive whole;
        finer: in a finer type where need be. turn: for what is packed in its order. most: bytes that the file may take, None
        for any number; nbytes: that it takes as planned."""
        self.turn, self.most, self.nbytes = turn, most, nbytes
        self.source, self.planned, self.sensitivity = source, types, sensitivity
        self.whole, self.finer, self.safetensors = whole, finer, safetensors
        self.types: dict[str, str] = {}
        self.copied = 0
        self.notes: list[str] = []
        self.shares = Shares(weight.patches for weight in source.weights.values())

    def of(self, weight: Weight) -> tuple[str, list[torch.Tensor]]:
        """(type, pieces of rows on the CPU) of a weight. Raises SaveError."""
        if not weight.is_number:
            tensor = weight.as_held()
            known = self.safetensors or tensor.dtype in PLAIN_DTYPES.values()
            return plain_type(weight, self.safetensors), [tensor if known else tensor.view(torch.int8)]
        kind = self.types[weight.name] = self.planned[weight.name]
        if weight.is_whole and not weight.patches and weight.held_as == kind:
            self.copied += 1
            tensor = weight.as_held()
            if not is_packed(tensor):
                _check(tensor, weight)
            return kind, [tensor]
        attempt = self._attempt(weight, kind)
        if attempt.swallows and self.finer and bits(kind) < bits(FINER):
            finer = fitting(FINER, weight.shape, HALF)
            self.notes.append(f"{weight.name} is {finer}: {kind} would swallow a part of its change.")
            kind, attempt = finer, self._attempt(weight, finer)
        if attempt.swallows and kind == FINER:
            attempt = self._attempt(weight, kind, dither=True)
        if attempt.pieces is None:
            kind, attempt = self._that_holds_it(weight, kind)
        for seen in attempt.seen:
            self.shares.add(*seen)
        self.types[weight.name] = kind
        return kind, attempt.pieces

    def _that_holds_it(self, weight: Weight, kind: str) -> tuple[str, _Attempt]:
        """A type for values that do not fit into `kind`, and the weight in it: BF16 has room for almost all, F32 for the rest,
        and where the size of the file has none for those, a smaller one may do. Raises SaveError where none does."""
        for other in ("BF16", "F32") if self.most is None else ("BF16", fitting(FINER, weight.shape, "BF16"), "F32"):
            larger = self._nbytes_with(weight, kind, other)
            if self.most is None or bits(other) == bits(kind) or bits(other) > bits(kind) and larger <= self.most:
                attempt = self._attempt(weight, other)
                if attempt.pieces is not None:
                    self.notes.append(f"{weight.name} is {other}: its values do not fit into {kind}.")
                    self.nbytes = larger
                    return other, attempt
        raise SaveError(f"The values of {shown(weight.name)} do not fit into {kind}, and with them in BF16 the file takes"
                        f" {size_text(self._nbytes_with(weight, kind, 'BF16'), DIGITS)}, which is more than"
                        f" {size_text(self.most, DIGITS)}."
                        " Choose one type in place of a size.")

    def _nbytes_with(self, weight: Weight, kind: str, other: str) -> int:
        """That the file takes at most with a weight in another type than planned."""
        more = nbytes_of(other, weight.shape) - nbytes_of(kind, weight.shape)
        return self.nbytes + more + ALIGNMENT * (bits(other) > bits(kind))

    def in_turn(self, name: str) -> tuple[str, list[torch.Tensor]]:
        """The same of a linear layer's weight, which counts as packed for those that come after it."""
        kind, pieces = self.of(self.source.weights[name])
        whole = join_rows(pieces)
        if is_packed(whole):
            bias = self.source.weights.get(f"{name.removesuffix('weight')}bias")
            self.turn.put(name, whole, None if bias is None else bias.patched(0, bias.shape[0]))
        return kind, [whole]

    def _moments(self, weight: Weight, kind: str) -> Moments | None:
        """What to pack a weight by. A change that is to arrive whole leaves no room for making up for other errors."""
        found = None
        if kind not in PLAIN_DTYPES and self.turn is not None and weight.name not in self.whole:
            found = self.turn.moments(weight.name)
        return self.sensitivity.moments(weight.name) if found is None and self.sensitivity is not None else found

    def _attempt(self, weight: Weight, kind: str, dither: bool = False) -> _Attempt:
        made, relative_error = _Attempt([]), RelativeError()
        moments = self._moments(weight, kind)
        for start, stop in weight.slices(SLICE_VALUES if moments is None else max(SLICE_VALUES, weight.values)):
            held, changes, values = self._patched(weight, start, stop)
            _check(values, weight)
            piece = self._piece(values, weight, kind, moments, dither)
            if piece is None:
                return _Attempt()
            if changes and not dither and weight.name in self.whole:
                piece, swallowed = self._enlarged(piece, held, values - held, weight, kind, moments)
                made.swallows |= swallowed
            made.pieces.append(piece)
            if changes:
                made.seen.append(self.shares.seen(held, changes, values_of(piece), start == 0))
            relative_error.add(values, piece)
        return made if relative_error.is_small else _Attempt()

    def _patched(self, weight: Weight, start: int, stop: int) -> tuple:
        """(what is held, [(number of the change, what it adds)], the patched values) of some rows, float32."""
        if not weight.patches:
            return None, [], weight.patched(start, stop)
        held = weight.read(start, stop)
        values, changes = held.clone(), []
        for number, patches in self.shares.groups(weight.patches):
            before = values.clone()
            values = weight.patched(start, stop, patches, values)
            if values.shape == before.shape:
                changes.append((number, values - before))
        return held, changes if values.shape == held.shape else [], values

    def _enlarged(self, piece: torch.Tensor, held: torch.Tensor, change: torch.Tensor, weight: Weight, kind: str,
                  moments) -> tuple[torch.Tensor, bool]:
        """(rows in which a change arrives whole, or the most that can be had of it, whether that is less)."""
        whole, factor = dot(change, change), 1.0
        for attempt in range(ATTEMPTS + 1):
            share = dot(values_of(piece) - held, change) / whole if whole else 1.0
            if abs(share - 1) <= WHOLE or attempt == ATTEMPTS or factor == MOST_ENLARGED and share < 1:
                return piece, abs(share - 1) > 2 * WHOLE
            factor = min(factor / max(share, 0.1), MOST_ENLARGED)
            piece = self._piece(held + factor * change, weight, kind, moments)

    def _piece(self, values: torch.Tensor, weight: Weight, kind: str, moments, dither: bool = False) -> torch.Tensor | None:
        """dither: where kind is FINER."""
        if kind in PLAIN_DTYPES:
            # A change below half a step of 16 bits would be gone, rounded to the nearest.
            piece = dithered(values.clone(), PLAIN_DTYPES[kind]) if weight.patches else values.to(PLAIN_DTYPES[kind])
            return piece.cpu() if piece.isfinite().all() else None
        try:
            if dither:
                return pack_tensor(_at_steps(values).to(self.source.device), FORMATS[kind], reference=True).to("cpu")
            options = {} if moments is None else {"moments": moments}
            return pack_tensor(values.to(self.source.device), FORMATS[kind], **options).to("cpu")
        except TooLargeError:
            return None
        except FormatError as error:
            raise SaveError(f"{shown(weight.name)} cannot be packed to {kind}: {error}") from error

    def told(self) -> list[str]:
        """What of the changes has arrived, and what came out otherwise than planned."""
        lines = [f"{self.copied} weights are copied bit for bit."] if self.copied else []
        more = [f"{len(self.notes) - 5} more weights came out finer than planned."] if self.notes[5:] else []
        return [*lines, *map(str, self.shares.found()), *self.notes[:5], *more]


def plain_type(weight: Weight, safetensors: bool) -> str:
    """The type of a tensor that is written as it is."""
    if safetensors:
        return DTYPES[weight.tensor.dtype]
    return next((name for name, plain in PLAIN_DTYPES.items() if plain == weight.tensor.dtype), "I8")


def bits(kind: str) -> float:
    """Bits a value of a type; 16 for the types of the host, of which the values are taken."""
    packed = FORMATS.get(kind)
    if kind in PLAIN_BYTES or packed is None:
        return 8.0 * PLAIN_BYTES.get(kind, 2)
    return 8 * packed.block_bytes / packed.block_length + (32 / packed.block_length if packed.scales_apart else 0)


def _at_steps(values: torch.Tensor) -> torch.Tensor:
    """Values that Q8_0 holds exactly, of each one of the two beside it, so that the mean of many keeps a change below a step.

    values: float32, rows that blocks of 32 divide.
    """
    blocks = values.reshape(-1, 32)
    most, place = blocks.abs().max(1, keepdim=True)
    step = (most / 127).half().float()
    codes = dithered_steps(blocks, step).clamp_(-127, 127)
    codes.scatter_(1, place, blocks.gather(1, place).sign() * 127)  # by which the format finds the step again
    return torch.where(step > 0, codes * step, 0.0).view(values.shape)


def _check(values: torch.Tensor, weight: Weight):
    """Raise SaveError for values that are no numbers."""
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        what = "with its patches it has" if weight.patches else "it has"
        raise SaveError(f"{shown(weight.name)} cannot be saved: {what} NaN or infinite values. Get the model again, or take"
                        " off what changes it.")
