"""Packing while loading: each weight of a file is read, packed and let go before the next one is read.

Only plain weights (F32, F16, BF16, fp8) and those in the host's own quantised formats are packed. What is packed already stays
as it is, bit for bit: packing it once more would lose twice. A weight whose values its type cannot hold stays plain.
"""
import collections
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...ops.format import FORMATS, FormatError, TooLargeError
from ...ops.packing import pack_tensor
from ...ops.tensor import QuantizedTensor, is_packed
from ..diffusers_names import JoinedRows
from ..files.container import PLAIN_DTYPES, FileChangeGuard, WeightFile, shown
from ..handover import model_prefix
from ..held import DONE, format_name
from ..progress import Progress
from ..model_names import in_the_hosts_names
from . import cache
from .host_formats import as_tensors, reject_unread_layers
from .plan import plan_for_type
from .relative_error import holds
from .rules import family_of

log = logging.getLogger(__name__)

# What a weight can be packed to while it is read, the finest first.
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "IQ4_XS", "NF4")
WORTH_KEEPING = 20  # seconds that packing takes, from which on the node says how to keep what was packed
SMOOTHING = ".pre_quant_scale"  # the host's: what a layer multiplies its input by


@dataclass(frozen=True)
class Packed:
    """What was done to the weights of a model while it was loaded.

    sources: names of the types that weights were packed from, those with the most values first. left: of the packed formats
    they were in already. seconds: all of it, reading included. cache: "kept" for the next time, "read" from there, or "".
    unfit: of each weight that a type cannot hold, what it is in place of that.
    """

    sources: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    seconds: float = 0.0
    cache: str = ""
    unfit: tuple[str, ...] = ()

    def attach(self, patcher):
        """Leave it with the host's ModelPatcher of the model, whose clones keep it. Returns that."""
        patcher.set_attachments(DONE, self)
        return patcher

    def __str__(self) -> str:
        """For people: 'packed from BF16 in 41 s'."""
        packed = f"packed from {' + '.join(self.sources)} in {self.seconds:.0f} s" if self.sources else "nothing was packed"
        if self.cache == "read":
            packed = f"packed from {' + '.join(self.sources)} before and kept"
        elif self.cache == "kept":
            packed += ", kept for the next time"
        elif self.seconds >= WORTH_KEEPING and not cache.is_on():
            packed += f" (to keep it, name a folder in {cache.FOLDER})"
        if self.unfit:
            packed += f"; {self.unfit[0]}" + (f"; {len(self.unfit) - 1} more as well" if self.unfit[1:] else "")
        return f"{packed}; {' + '.join(self.left)} stays as in the file" if self.left else packed

    @classmethod
    def together(cls, parts: Iterable["Packed"]) -> "Packed":
        """Of a model from several files."""
        parts = list(parts)
        sources, left, unfit = (tuple(dict.fromkeys(name for part in parts for name in getattr(part, field)))
                                for field in ("sources", "left", "unfit"))
        states = {part.cache for part in parts if part.sources}
        return cls(sources, left, sum(part.seconds for part in parts), states.pop() if len(states) == 1 else "",
                   unfit)


def read_weights(file: WeightFile, type_name: str | None, progress: Progress) -> tuple[dict[str, torch.Tensor], Packed | None]:
    """The weights of a diffusion model or of a whole checkpoint in the host's names, the model's packed to one of `TYPES`.

    type_name: None: as they are in the file. Raises WeightFileError.
    """
    state_dict = file.state_dict(progress.track)
    if type_name is None:
        reject_unread_layers(file, state_dict)
        return in_the_hosts_names(state_dict), None
    prefix = model_prefix(state_dict)
    state_dict = in_the_hosts_names(as_tensors(file, state_dict, prefix), later=True)
    return state_dict, pack_weights(file, state_dict, type_name, progress, prefix)


def pack_weights(file: WeightFile, state_dict: dict[str, torch.Tensor], type_name: str, progress: Progress,
                 prefix: str = "") -> Packed:
    """Pack the weights of a model to one of `TYPES`, in place, as the plan for that type says.

    state_dict: of `file`, in the host's names, quantised weights of the host put together (`host_formats.as_tensors`). prefix:
    of the names of the model; nothing else is touched. Beside the packed weights at most two dense ones are in memory: what was
    read of the file is let go after each. Raises WeightFileError for values that are not numbers, and where one of the files
    that the weights lie in is written to meanwhile.
    """
    started = time.perf_counter()
    weights = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix) and tensor.dtype.is_floating_point
               and tensor.numel() and not name.endswith(SMOOTHING)}
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in weights.items()}
    halves = {name.removeprefix(prefix): _half(tensor.dtype) for name, tensor in weights.items()}
    types = plan_for_type(shapes, type_name, family_of(shapes), halves).types
    wanted = {name: (types[name.removeprefix(prefix)], tuple(tensor.shape)) for name, tensor in weights.items()
              if types[name.removeprefix(prefix)] not in PLAIN_DTYPES and not is_packed(tensor)}
    entry = cache.entry_of(file, wanted)
    cached = cache.read(entry, wanted)
    guard = _guard_of(state_dict)
    sources, left, unfit = collections.Counter(), collections.Counter(), []
    with cache.keeping(None if cached else entry, wanted) as keep:
        for name in progress.track(list(weights), [tensor.numel() for tensor in weights.values()]):
            guard()
            tensor = weights.pop(name)
            if is_packed(tensor):
                left[format_name(tensor)] += tensor.numel()
                continue
            smoothing = state_dict.pop(name.removesuffix(".weight") + SMOOTHING, None)
            if name in wanted:
                sources[format_name(tensor.parts[0][0] if isinstance(tensor, JoinedRows) else tensor)] += tensor.numel()
                kind, _ = wanted[name]
                state_dict[name] = cached[name] if cached else _packed(file, name, _values(tensor, smoothing), kind, guard)
                if is_packed(state_dict[name]):
                    keep(name, state_dict[name])
                else:
                    unfit.append(f"{shown(name)} is {format_name(state_dict[name])}: its values do not fit into {kind}")
                    log.warning("[Featherweight] %s: %s.", os.path.basename(file.path), unfit[-1])
                    keep.give_up("not every weight fits into its type")
            else:
                state_dict[name] = _kept(_values(tensor, smoothing), types[name.removeprefix(prefix)])
            del tensor
            file.let_go()
        guard()
    done = Packed(tuple(name for name, _ in sources.most_common()), tuple(name for name, _ in left.most_common()),
                  time.perf_counter() - started, "read" if cached else "kept" if keep.done else "", tuple(unfit))
    log.info("[Featherweight] %s: %d weights of %d to %s, %s", os.path.basename(file.path), len(wanted), len(types), type_name,
             done)
    return done


def _guard_of(state_dict: Mapping[str, torch.Tensor | JoinedRows]) -> FileChangeGuard:
    """Return what raises where a file is written to that one of these weights is still to be read from."""
    return FileChangeGuard.of(part for tensor in state_dict.values()
                              for part in (tensor.tensors if isinstance(tensor, JoinedRows) else (tensor,)))


def _half(dtype: torch.dtype) -> str:
    """The 16-bit type that what is not packed is kept in. F16 has more of a float32's digits, and most of its range in use."""
    return "F16" if dtype in (torch.float16, torch.float32) else "BF16"


def _values(tensor: torch.Tensor | JoinedRows, smoothing: torch.Tensor | None) -> torch.Tensor:
    """A dense float tensor of what a file keeps in one or several; in a dtype that holds the values as they are."""
    if isinstance(tensor, JoinedRows):
        tensor = tensor.joined()
    if isinstance(tensor, QuantizedTensor):
        tensor = tensor.dequantize()
    elif tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # of fp8 it holds every value
    return tensor if smoothing is None else tensor.float() * smoothing.float()


def _packed(file: WeightFile, name: str, values: torch.Tensor, kind: str, guard: FileChangeGuard) -> torch.Tensor:
    """A weight in a packed type, or plain where that cannot hold its values. guard: of its file, which is read twice."""
    try:
        packed = pack_tensor(values, FORMATS[kind])
        guard()
        if holds(packed, values):
            return packed
    except FormatError as error:
        if not isinstance(error, TooLargeError):
            raise file.error_at(name, f"{shown(name)} cannot be packed to {kind}: {str(error).rstrip('.')}",
                                "Get another copy of the model, or load it with 'pack to' as the file.") from error
    return _kept(values, _half(values.dtype))


def _kept(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """A tensor that is not packed: in 16 bits as the file has it, otherwise as the plan says, or wider where that is needed."""
    if tensor.dtype in (torch.float16, torch.bfloat16) or kind == "F32":
        return tensor
    narrower = (tensor.to(PLAIN_DTYPES[name]) for name in (kind, "BF16"))
    return next((narrow for narrow in narrower if narrow.isfinite().all() and holds(narrow, tensor)), tensor.float())
