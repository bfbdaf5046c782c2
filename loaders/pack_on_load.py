"""Packing while loading: each weight of a file is read, packed and let go before the next one is
read.

Only plain weights (F32, F16, BF16, fp8) and those in the host's own quantised formats are packed.
What is packed already stays as it is, bit for bit: packing it once more would lose twice. A weight
whose values its type cannot hold stays plain.
"""
import collections
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..ops.format import FORMATS, FormatError, TooLargeError
from ..ops.packed_layout import QuantizedTensor, is_packed
from ..ops.quantize import pack_tensor
from ..ops.quantize.relative_error import holds
from .comfy_quant import SMOOTHING
from .diffusers_keys import JoinedRows
from .files import packed_cache
from .files.container import PLAIN_DTYPES, FileChangeGuard, WeightFile, safe_repr
from .model_summary import PACK_STATS_KEY, format_name
from .packing.planning.packing_rules import half_type, rules_for
from .packing.planning.plan import plan_for_type
from .progress import Progress

log = logging.getLogger(__name__)

# What a weight can be packed to while it is read, the finest first.
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "IQ4_XS", "NF4")
# seconds that packing takes, from which on the node says how to keep what was packed
MIN_CACHED_BYTES = 20


@dataclass(frozen=True)
class Packed:
    """What was done to the weights of a model while it was loaded.

    sources: names of the types that weights were packed from, those with the most values first.
    unchanged: of the packed formats they were in already. seconds: all of it, reading included.
    cache: "kept" for the next time, "read" from there, or "". unfit: of each weight that a type
    cannot hold, what it is in place of that.
    """

    sources: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    seconds: float = 0.0
    cache: str = ""
    unfit: tuple[str, ...] = ()

    def attach(self, patcher):
        """Leave it with the host's ModelPatcher of the model, whose clones keep it. Returns
        that."""
        patcher.set_attachments(PACK_STATS_KEY, self)
        return patcher

    def __str__(self) -> str:
        """For people: 'packed from BF16 in 41 s'."""
        packed = (
            f"packed from {' + '.join(self.sources)} in {self.seconds:.0f} s"
            if self.sources
            else "nothing was packed"
        )
        if self.cache == "read":
            packed = f"packed from {' + '.join(self.sources)} before and kept"
        elif self.cache == "kept":
            packed += ", kept for the next time"
        elif self.seconds >= MIN_CACHED_BYTES and not packed_cache.is_enabled():
            packed += f" (to keep it, name a folder in {packed_cache.FOLDER})"
        if self.unfit:
            packed += f"; {self.unfit[0]}" + (
                f"; {len(self.unfit) - 1} more as well" if self.unfit[1:] else ""
            )
        return (
            f"{packed}; {' + '.join(self.unchanged)} stays as in the file"
            if self.unchanged
            else packed
        )

    @classmethod
    def together(cls, parts: Iterable["Packed"]) -> "Packed":
        """Of a model from several files."""
        parts = list(parts)
        sources, unchanged, unfit = (
            tuple(dict.fromkeys(name for part in parts for name in getattr(part, field)))
            for field in ("sources", "unchanged", "unfit"))
        caches = {part.cache for part in parts if part.sources}
        seconds = sum(part.seconds for part in parts)
        return cls(sources, unchanged, seconds, caches.pop() if len(caches) == 1 else "", unfit)


def pack_weights(file: WeightFile, state_dict: dict[str, torch.Tensor], type_name: str,
                 progress: Progress, prefix: str = "") -> Packed:
    """Pack the weights of a model, in place, as the plan for a type says.

    In memory are, beside the packed weights, at most two dense ones: what was read of the file is
    let go after each.

    Args:
        file: of the weights.
        state_dict: of `file`, in the host's names, quantised weights of the host put together
            (`comfy_quant.as_tensors`).
        type_name: one of `TYPES`.
        progress: gets a stage.
        prefix: of the names of the model; nothing else is touched.

    Raises:
        WeightFileError: for values that are not numbers, and where one of the files that the
            weights lie in is written to meanwhile.
    """
    started = time.perf_counter()
    weights = {
        name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)
        and tensor.dtype.is_floating_point and tensor.numel() and not name.endswith(SMOOTHING)
    }
    types = _types_for(weights, type_name, prefix)
    wanted = {name: (types[name], tuple(tensor.shape)) for name, tensor in weights.items()
              if types[name] not in PLAIN_DTYPES and not is_packed(tensor)}
    entry = packed_cache.entry_path(file, wanted)
    cached = packed_cache.read(entry, wanted)
    guard = _guard_of(state_dict)
    sources, unchanged, unfit = collections.Counter(), collections.Counter(), []
    with packed_cache.entry_writer(None if cached else entry, wanted) as new_entry:
        for name in progress.track(list(weights), [tensor.numel() for tensor in weights.values()]):
            guard()
            tensor = weights.pop(name)
            if is_packed(tensor):
                unchanged[format_name(tensor)] += tensor.numel()
                continue
            smoothing = state_dict.pop(name.removesuffix(".weight") + SMOOTHING, None)
            if name not in wanted:
                state_dict[name] = _downcast(_read(tensor, smoothing), types[name])
            else:
                sources[format_name(tensor.parts[0][0] if isinstance(tensor, JoinedRows) else tensor
                                    )] += tensor.numel()
                weight = (
                    cached[name]
                    if cached
                    else _packed(file, name, _read(tensor, smoothing), types[name], guard)
                )
                state_dict[name] = weight
                if is_packed(weight):
                    new_entry.write(name, weight)
                else:
                    unfit.append(
                        f"{safe_repr(name)} is {format_name(weight)}: its values do not fit into"
                        f" {types[name]}"
                    )
                    log.warning("[Featherweight] %s: %s.", os.path.basename(file.path), unfit[-1])
                    new_entry.give_up("not every weight fits into its type")
            del tensor
            file.drop_pages()
        guard()
    cache = "read" if cached else "kept" if new_entry.is_written else ""
    packed = Packed(tuple(name for name, _ in sources.most_common()),
                    tuple(name for name, _ in unchanged.most_common()),
                    time.perf_counter() - started, cache, tuple(unfit))
    log.info("[Featherweight] %s: %d weights of %d to %s, %s", os.path.basename(file.path),
             len(wanted), len(types), type_name, packed)
    return packed


def _types_for(weights: Mapping[str, torch.Tensor | JoinedRows], type_name: str,
               prefix: str) -> dict[str, str]:
    """Name -> the type that the plan for `type_name` gives each weight."""
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in weights.items()}
    halves = {
        name.removeprefix(prefix): half_type(tensor.dtype) for name, tensor in weights.items()
    }
    planned = plan_for_type(shapes, type_name, rules_for(shapes), halves).types
    return {name: planned[name.removeprefix(prefix)] for name in weights}


def _guard_of(state_dict: Mapping[str, torch.Tensor | JoinedRows]) -> FileChangeGuard:
    """Return what raises where a file is written to that one of these weights is still to be read
    from."""
    return FileChangeGuard.of(
        part for tensor in state_dict.values()
        for part in (tensor.tensors if isinstance(tensor, JoinedRows) else (tensor,)))


def _read(tensor: torch.Tensor | JoinedRows, smoothing: torch.Tensor | None) -> torch.Tensor:
    """A dense float tensor of what a file keeps in one or several; in a dtype that holds the values
    as they are."""
    if isinstance(tensor, JoinedRows):
        tensor = tensor.joined()
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    elif tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # of fp8 it holds every value
    return tensor if smoothing is None else tensor.float() * smoothing.float()


def _packed(file: WeightFile, name: str, values: torch.Tensor, type_name: str,
            guard: FileChangeGuard) -> torch.Tensor:
    """A weight in a packed type, or plain where that cannot hold its values. guard: of its file,
    which is read twice."""
    try:
        packed = pack_tensor(values, FORMATS[type_name])
        guard()
        if holds(packed, values):
            return packed
    except FormatError as error:
        if not isinstance(error, TooLargeError):
            raise file.error_at(
                name,
                f"{safe_repr(name)} cannot be packed to {type_name}: {str(error).rstrip('.')}",
                "Get another copy of the model, or load it with 'pack to' as the file.") from error
    return _downcast(values, half_type(values.dtype))


def _downcast(tensor: torch.Tensor, type_name: str) -> torch.Tensor:
    """A tensor that is not packed: in 16 bits as the file has it, otherwise as the plan says, or
    wider where that is needed."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or type_name == "F32":
        return tensor
    for name in (type_name, "BF16"):
        narrowed = tensor.to(PLAIN_DTYPES[name])
        if narrowed.isfinite().all() and holds(narrowed, tensor):
            return narrowed
    return tensor.float()
