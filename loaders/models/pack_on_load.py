"""Packs weights while they are loaded: one is read, packed and released before the next is read.

Plain weights (F32, F16, BF16, fp8) and those in the host's own quantised formats are packed. Other
packed weights stay as they are, bit for bit, since packing them again would lose precision twice;
but to the host's own types they are packed again, and to a size those that do not fit as they are.
A weight stays plain if the type cannot represent its values. Packing runs on the device that
computes, or on the CPU where that is out of memory.
"""
import collections
import functools
import os
import time
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import comfy.model_management
import torch

from ...ops.formats.base import FormatError, TooLargeError
from ...ops.log import log
from ...ops.packing.pack_types import LOAD, ROW_TYPES, TYPES, pack_type
from ...ops.packing.packed_pieces import PackedPieces
from ...ops.packing.relative_error import holds
from ...ops.tensor.packed_layout import QuantizedTensor, is_packed, packed_tensors
from ...ops.tensor.row_slicing import take_rows
from ..byte_sizes import size_text
from ..comfyui.diffusers_keys import JoinedRows
from ..comfyui.model_summary import PACK_STATS_KEY, format_name, title_of
from ..container.weight_file import (
    PLAIN_DTYPES,
    FileChangeGuard,
    FileState,
    WeightFile,
    WeightFileError,
    safe_repr,
)
from ..devices import CPU
from ..families import rules_for
from ..files import packed_cache
from ..out_of_memory import is_out_of_memory
from ..packing.calibration.imatrix import load_measurement
from ..packing.calibration.sensitivity import Sensitivity, SensitivityError
from ..packing.layer_losses import WEIGHTS, loss_text, total
from ..packing.planning.plan import STAYS, PlanError, plan_for_size, plan_for_type
from ..packing_rules import Shapes, half_type
from ..paths.folders import imatrix_of, packed_folder, sensitivities_of
from ..progress import Progress
from .cache_entry import entry_weights, most_bytes, read_entry, suffix_for, write_entry

LOAD_TYPES = tuple(name for name, each in TYPES.items() if LOAD in each.menus)
PackTo = str | int  # one of LOAD_TYPES, or the bytes that the best mix of types takes at most
# By how many values of a weight the speed is measured, and from how many values of a model on.
MEASURED_VALUES, MANY_VALUES = 1 << 22, 1 << 28
WHOLE_ROWS = 64  # are whole blocks of every type


class PackedFrom(Protocol):
    """What weights are packed from, as messages need it: a file, or a model in memory."""

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        ...

    @property
    def path(self) -> str | os.PathLike:
        """Of the file; "" where none is known."""
        ...

    def drop_pages(self):
        """Releases the pages of files that a weight was read from."""

    def error_at(self, name: str, problem: str, advice: str) -> WeightFileError:
        """Returns an error at the tensor `name`; see `WeightFile.error_at`."""
        ...


@dataclass(frozen=True)
class PackStats:
    """What was packed while a model was loaded.

    Attributes:
        sources: types that weights were packed from, those with the most values first.
        unchanged: formats of the weights that were packed already, in the same order.
        seconds: of the whole load, reading included.
        loss: power of the error over that of the weights; 0 where a measurement chose the types, so
            that it says nothing of the image.
        is_second: whether weights that were packed already are among them.
        cache: "kept" if the weights were written to the cache, "read" if they came from it, or "".
        folder: of the cache, for people.
        unfit: a message for each weight that its type cannot represent.
    """

    sources: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    seconds: float = 0.0
    loss: float = 0.0
    is_second: bool = False
    cache: str = ""
    folder: str = ""
    unfit: tuple[str, ...] = ()

    def attach(self, patcher):
        """Attaches the stats to the host's ModelPatcher, whose clones keep them."""
        patcher.set_attachments(PACK_STATS_KEY, self)

    def __str__(self) -> str:
        """Returns a text for people: 'packed from BF16 in 41 s'."""
        sources = " + ".join(self.sources)
        if self.cache == "read":
            text = f"packed from {sources} in an earlier load"
        elif self.sources:
            text = f"packed from {sources} in {self.seconds:.0f} s"
        else:
            text = "nothing was packed"
        if self.loss:
            text += f", {'added ' * self.is_second}loss: {loss_text(self.loss, WEIGHTS)}"
        if self.cache:
            text += (f", kept{' for the next time' if self.cache == 'kept' else ''} in"
                     f" {self.folder} ({packed_cache.FOLDER}={packed_cache.OFF} keeps nothing)")
        if self.unfit:
            text += f"; {self.unfit[0]}"
        if len(self.unfit) > 1:
            text += f"; {len(self.unfit) - 1} more as well"
        if self.unchanged:
            text += f"; {' + '.join(self.unchanged)} stays as in the file"
        return text

    @classmethod
    def merge(cls, parts: Iterable["PackStats | None"]) -> "PackStats | None":
        """Returns the stats of a model of several files, None where nothing was to be packed."""
        parts = [part for part in parts if part]
        if not parts:
            return None
        sources, unchanged, unfit = (
            tuple(dict.fromkeys(name for part in parts for name in getattr(part, field)))
            for field in ("sources", "unchanged", "unfit"))
        caches = {part.cache for part in parts if part.sources}
        seconds, loss = sum(part.seconds for part in parts), max(part.loss for part in parts)
        is_second = any(part.is_second for part in parts)
        cache = caches.pop() if len(caches) == 1 else ""
        folder = next((part.folder for part in parts if part.folder), "")
        return cls(sources, unchanged, seconds, loss, is_second, cache, folder, unfit)


def may_have_host_formats(pack_to: PackTo) -> bool:
    """Returns whether weights in the host's own formats are among those packed to this: where it is
    one of these, or a size for which they stay."""
    return pack_to in ROW_TYPES or isinstance(pack_to, int)


def pack_weights(file: PackedFrom, state_dict: dict[str, torch.Tensor], pack_to: PackTo,
                 progress: Progress, prefix: str = "", device: torch.device = CPU,
                 fixed: Container[str] = ()) -> PackStats:
    """Packs the weights of a model in place, by the plan for a type.

    Besides the packed weights, at most two dense ones are in memory: after each weight the pages of
    the file are released.

    Args:
        file: of the weights. What is packed of another than a file is not kept for the next time.
        state_dict: of `file`, with the host's names, after `quantized_weights.as_tensors`.
        pack_to: see `PackTo`.
        progress: advances by one stage.
        prefix: of the names of the model; other weights stay as they are.
        device: packs the weights, which stay on the CPU.
        fixed: names of weights that stay as they are.

    Raises:
        WeightFileError: if a value is not finite, if the weights do not fit into the size, or if a
            file of the weights changes meanwhile.
    """
    started = time.perf_counter()
    weights = {
        name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)
        and tensor.dtype.is_floating_point and tensor.numel()
    }
    plan = _plan_for(file, weights, pack_to, prefix, fixed)
    folder, path, entry = packed_cache.folder(packed_folder()), None, None
    cached_file = file if isinstance(file, WeightFile) else None
    if cached_file:
        path = packed_cache.entry_path(cached_file, plan.packed, folder, suffix_for(pack_to),
                                       plan.measurement_state)
        entry = packed_cache.read(path, functools.partial(read_entry, wanted={
            name.removeprefix(prefix): each for name, each in plan.changed.items()}))
    packer = _Packer(file, _guard_of(state_dict), device, plan.measured, prefix)
    tally = _Tally(file.name)
    sizes = [tensor.numel() for tensor in weights.values()]
    heading = "" if entry else _announcement(weights, plan.packed, packer)
    for name in progress.track(list(weights), sizes, heading):
        packer.guard()
        tensor = weights.pop(name)
        if name not in plan.changed:
            tally.unchanged[_source_format(tensor)] += tensor.numel()
            continue
        type_name, _ = plan.changed[name]
        share = 0.0
        if entry:
            weight = entry.weights[name.removeprefix(prefix)]
        elif name in plan.packed:
            weight, share = packer.pack(name, tensor, type_name)
        else:
            weight = _downcast(_read_dense(tensor), type_name)
        state_dict[name] = weight
        if name in plan.packed:
            tally.add(name, type_name, tensor, weight, share)
        del tensor
        file.drop_pages()
    packer.guard()
    cache, loss = ("read", entry.loss) if entry else (
        "", total(tally.losses, WEIGHTS, tally.values))
    if plan.measured:
        loss = 0.0
    if cached_file and not entry and packed_cache.keeps(time.perf_counter() - started):
        tensors = entry_weights(state_dict, prefix)
        write = functools.partial(write_entry, file=cached_file, tensors=tensors, loss=loss)
        cache = "kept" if packed_cache.keep(path, most_bytes(tensors), write) else ""
    stats = PackStats(tuple(name for name, _ in tally.sources.most_common()),
                      tuple(name for name, _ in tally.unchanged.most_common()),
                      time.perf_counter() - started, loss, tally.is_second, cache, str(folder),
                      tuple(tally.unfit))
    log.info("%s: %d weights of %d to %s, %s", file.name, len(plan.packed), len(sizes),
             size_text(pack_to) if isinstance(pack_to, int) else pack_to, stats)
    return stats


@dataclass(frozen=True)
class _LoadPlan:
    """What weights are packed to: name -> (type, shape) of those that do not stay as they are in
    the file, and the measurement by which they are packed, with the state of its file."""

    changed: packed_cache.PackedTypes
    measured: Sensitivity | None = None
    measurement_state: FileState | None = None

    @functools.cached_property
    def packed(self) -> packed_cache.PackedTypes:
        """Those of `changed` whose type is not plain."""
        return {name: (type_name, shape) for name, (type_name, shape) in self.changed.items()
                if not TYPES[type_name].is_plain}


class _Tally:
    """Counts what is done with the weights of a file or model, whose name is for the log."""

    def __init__(self, name: str):
        self.name = name
        self.sources: collections.Counter[str] = collections.Counter()
        self.unchanged: collections.Counter[str] = collections.Counter()
        self.losses: dict[str, float] = {}
        self.values: dict[str, int] = {}
        self.unfit: list[str] = []
        self.is_second = False

    def add(self, name: str, type_name: str, stored: torch.Tensor | JoinedRows,
            weight: torch.Tensor, share: float):
        """Counts a weight that was to be packed; share: power of its error over its values'."""
        self.sources[_source_format(stored)] += stored.numel()
        self.is_second |= is_packed(stored)
        if is_packed(weight):
            self.losses[name], self.values[name] = share, weight.numel()
            return
        self.unfit.append(f"{safe_repr(name)} is {format_name(weight)}: its values do not fit into"
                          f" {type_name}")
        log.warning("%s: %s.", self.name, self.unfit[-1])


def _stays(tensor: torch.Tensor | JoinedRows, type_name: str, is_for_size: bool) -> bool:
    """Returns whether a weight stays packed as it is in the file."""
    if is_for_size or not is_packed(tensor):
        return type_name == STAYS
    wanted, packed_format = pack_type(type_name), tensor.params.format
    if wanted.is_host_type:
        return packed_format == wanted.format_of(tuple(tensor.shape))
    return not packed_format.is_host_format


def _announcement(weights: Mapping[str, torch.Tensor | JoinedRows],
                  to_pack: packed_cache.PackedTypes, packer: "_Packer") -> str:
    """Returns what is going to be packed, with both sizes, and in a large model the time that it
    takes: "Q4_K, 6.8 GB, becomes int8_convrot, 12 GB, in about 3 min"."""
    if not to_pack:
        return ""
    sources: collections.Counter[str] = collections.Counter()
    for name in to_pack:
        sources[_source_format(weights[name])] += weights[name].numel()
    before = sum(_bytes_of(weights[name]) for name in to_pack)
    after = sum(pack_type(type_name).nbytes(shape) for type_name, shape in to_pack.values())
    types = dict.fromkeys(type_name for type_name, _ in to_pack.values())
    text = (f"{' + '.join(name for name, _ in sources.most_common())}, {size_text(before)}, becomes"
            f" {' + '.join(types)}, {size_text(after)}")
    if sources.total() >= MANY_VALUES:
        name = max(to_pack, key=lambda name: weights[name].numel())
        seconds = packer.seconds_for(name, weights[name], to_pack[name][0], sources.total())
        if seconds:
            text += f", in about {_rounded(seconds)}"
    return text


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _bytes_of(tensor: torch.Tensor | JoinedRows) -> int:
    parts = tensor.tensors if isinstance(tensor, JoinedRows) else (tensor,)
    return sum(sum(each.nbytes for each in packed_tensors(part)) if is_packed(part) else part.nbytes
               for part in parts)


def _plan_for(file: PackedFrom, weights: Mapping[str, torch.Tensor | JoinedRows], pack_to: PackTo,
              prefix: str, fixed: Container[str]) -> _LoadPlan:
    """Plans what weights are packed to, or raises WeightFileError; arguments of `pack_weights`."""
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in weights.items()}
    free = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
            if name not in fixed}
    planned = {name: shapes[name] for name in free}
    halves = {name: half_type(tensor.dtype) for name, tensor in free.items()}
    rules, measured, state = rules_for(shapes), None, None
    if isinstance(pack_to, int):
        measured, state = measurement_of(file, shapes)
        if measured:
            log.info("%s is packed by %s", file.name, measured.file)
        budget = pack_to - sum(_bytes_of(weights[name]) for name in weights if name in fixed)
        packed = {name: _bytes_of(tensor) for name, tensor in free.items() if is_packed(tensor)}
        try:
            types = plan_for_size(planned, budget, rules, measured and measured.costs, halves,
                                  packed=packed).types
        except PlanError as error:
            raise WeightFileError(f"{file.name}: {error}") from error
    else:
        types = plan_for_type(planned, pack_to, rules, halves).types
    return _LoadPlan({
        f"{prefix}{name}": (types[name], shapes[name]) for name, tensor in free.items()
        if not _stays(tensor, types[name], isinstance(pack_to, int))}, measured, state)


def measurement_of(file: PackedFrom, shapes: Shapes
                   ) -> tuple[Sensitivity | None, FileState | None]:
    """Returns the newest measurement of a model that is used and fits it, else an imatrix next to
    its file, and the state of that file; None for both where there is none.

    Args:
        file: of the model.
        shapes: of its weights, in the host's names.
    """
    for path in filter(None, (*sensitivities_of(file.path), imatrix_of(file.path))):
        state = FileState.of(path)
        try:
            measured = load_measurement(path).match(shapes)
        except (SensitivityError, WeightFileError) as error:
            log.warning("%s", error)
            continue
        if not measured.is_unused:
            return measured, state
        log.info("%s", *measured.notes([], False))
    return None, None


def _source_format(tensor: torch.Tensor | JoinedRows) -> str:
    return title_of(format_name(tensor.tensors[0] if isinstance(tensor, JoinedRows) else tensor))


def _guard_of(state_dict: Mapping[str, torch.Tensor | JoinedRows]) -> FileChangeGuard:
    """Returns a guard that raises once a file has changed that a weight is still read from."""
    return FileChangeGuard.of(
        part for tensor in state_dict.values()
        for part in (tensor.tensors if isinstance(tensor, JoinedRows) else (tensor,)))


def _read_dense(tensor: torch.Tensor | JoinedRows, device: torch.device = CPU) -> torch.Tensor:
    """Returns a weight, of any dtype or in a quantised format of the host, on a device as one dense
    tensor in a dtype that represents its values exactly."""
    if isinstance(tensor, JoinedRows):
        tensor = tensor.joined()
    tensor = tensor.to(device)
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    elif tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # which has every value of fp8
    return tensor


class _Packer:
    """Packs the weights of a file on a device, or on the CPU where that is out of memory.

    file: for messages. guard: of the file, which is read twice. measured: of the model, by which
    weights are rounded to types of GGUF. prefix: of the model's names.
    """

    def __init__(self, file: PackedFrom, guard: FileChangeGuard, device: torch.device,
                 measured: Sensitivity | None = None, prefix: str = ""):
        self.file = file
        self.guard = guard
        self.device = device
        self.measured = measured
        self.prefix = prefix
        self._has_logged = False

    def pack(self, name: str, tensor: torch.Tensor | JoinedRows,
             type_name: str) -> tuple[torch.Tensor, float]:
        """Returns a stored weight on the CPU in a packed type, or plain if that cannot hold its
        values; and the power of the packed one's error over that of the values."""
        try:
            return self._pack_on(self.device, name, tensor, type_name)
        except Exception as error:
            if self.device == CPU or not is_out_of_memory(error):
                raise
            if not self._has_logged:
                log.warning("%s: %s is too large for the free memory of %s, so it"
                            " is packed on the CPU, as are others like it.",
                            os.path.basename(self.file.path), safe_repr(name), self.device)
            self._has_logged = True
        comfy.model_management.soft_empty_cache()
        return self._pack_on(CPU, name, tensor, type_name)

    def seconds_for(self, name: str, tensor: torch.Tensor | JoinedRows, type_name: str,
                    values: int) -> float:
        """Estimates how long packing so many values takes, by some rows of a weight; 0 where that
        fails. Other arguments as for `pack`."""
        part = tensor.tensors[0] if isinstance(tensor, JoinedRows) else tensor
        rows = max(1, MEASURED_VALUES * len(part) // part.numel() // WHOLE_ROWS) * WHOLE_ROWS
        part = take_rows(part, slice(0, rows))
        seconds = 0.0
        for _ in range(2):  # the first time kernels are made ready
            started = time.perf_counter()
            try:
                self.pack(name, part, type_name)
            except WeightFileError:  # is raised again where the whole weight is packed
                return 0.0
            seconds = time.perf_counter() - started
        return seconds * values / part.numel()

    def _pack_on(self, device: torch.device, name: str, tensor: torch.Tensor | JoinedRows,
                 type_name: str) -> tuple[torch.Tensor, float]:
        values = _read_dense(tensor, device)
        moments = self.measured and self.measured.moments(name.removeprefix(self.prefix))
        packed = PackedPieces(TYPES[type_name], moments, device)
        try:
            piece = packed.pack(values)
            self.guard()
            packed.add(values, piece)
            if packed.is_held:
                return piece, packed.error.share
        except FormatError as problem:
            if not isinstance(problem, TooLargeError):
                raise self.file.error_at(
                    name,
                    f"{safe_repr(name)} cannot be packed to {type_name}:"
                    f" {str(problem).rstrip('.')}",
                    "Get another copy of the model, or load it with no change at 'pack to'."
                ) from problem
        return _downcast(values.to(CPU), half_type(values.dtype)), 0.0


def _downcast(tensor: torch.Tensor, type_name: str) -> torch.Tensor:
    """Returns a plain weight in 16 bits: the file's type, else the plan's, else BF16; or float32 if
    none of them represents its values."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or type_name == "F32":
        return tensor
    for name in (type_name, "BF16"):
        half = tensor.to(PLAIN_DTYPES[name])
        if half.isfinite().all() and holds(half, tensor):
            return half
    return tensor.float()
