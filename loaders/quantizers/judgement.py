"""Judges what a file holds by its headers and a few values, before anything is packed.

| found | what follows |
|---|---|
| codes without their scales, also where a tool made floats of them | refused |
| whole numbers where a model has floats | refused |
| metadata that contradicts marks, or names rotated layers that are not there | refused |
| nvfp4 that only its lost mark would tell from another writer's | refused |
| scales that are not finite | refused |
| int8 with scales in a file without any mark | told, and read as not rotated |
| matrices of zeros, but those that trainings begin with | told |
"""
import contextlib
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ...ops.tensor.packed_layout import QuantizedTensor, is_packed, packed_tensors
from ..container.weight_file import (
    CONFIG_KEY,
    DOWNLOAD_AGAIN,
    WeightFile,
    WeightFileError,
    safe_repr,
)
from ..name_lists import join_some
from ..refusals.read_anyway import READ_ANYWAY, reads_anyway
from .base import scaled_layers
from .comfy_quant import nvfp4_scale_shapes
from .comfy_quant_formats import FP8, SCALE, SCALE_2, format_of, is_rotated
from .comfy_quant_marks import (
    MARK,
    OLD_MARKER,
    OLD_SCALE,
    MarkError,
    bytes_of,
    listed_layers,
    marked_layers,
    read_mark,
)
from .leftover_scales import MAX_UNSCALED

FIRST_BYTES = 4096  # of a weight, that are read to see whether it is all zeros
LAST_BYTES = 1 << 16  # of a file, likewise
FIRST_VALUES = 2048  # of floats, that may be codes
FEWEST_CODES = 17  # different values; constants are no codes
MOST_SCALES = 1 << 20  # values of a scale that is looked at; others are while the model runs
# parts of a layer that are no scales of its weight, and what has floats
BESIDE = {"weight", "bias", "input_scale", "scale_input", "activation_scale", OLD_MARKER}
FLOATS = ("weight", "bias", "scale")
TABLE = re.compile(r"(^|\.)(shared|wte|\w*embed\w*)\.weight$")  # whose values may be of any size
# what a training begins with zeros of, and tables of positions
OFTEN_ZEROS = re.compile(
    r"zero|control|before_proj|after_proj|hint|adapter|lora|pos_?emb|position", re.IGNORECASE)
ROTATED_TEXT = re.compile(
    r"(convrot|quarot|rotat|hadamard|spin_?quant)\w*[\"']?\s*[:=]\s*[\"']?"
    r"(true|yes|[1-9]|quarot|hadamard)", re.IGNORECASE)
CODES = "holds codes without their scales"
BROKEN = ", as after a broken download. Download the file again if images are wrong."
GET_ORIGINAL = "Get the file as its writer published it, with its header."


class Refusal(NamedTuple):
    """A tensor's name, what is wrong with it as a clause, and what to do."""
    name: str
    problem: str
    advice: str


class Judgement(NamedTuple):
    """What of a file is refused, None for nothing, sentences for the node, and whether it has lost
    marks, so that another writer's reader may take it."""
    refused: Refusal | None
    told: tuple[str, ...]
    has_lost_marks: bool

    def reject(self, error_at: Callable[[str, str, str], Exception]):
        """Raises what `error_at` makes of a refusal, unless the owner wants such files loaded."""
        if self.refused is not None and not reads_anyway():
            name, problem, advice = self.refused
            raise error_at(name, problem, f"{advice} {READ_ANYWAY}")


def judge(headers: Mapping[str, Any], metadata: Mapping[str, Any],
          sample: Callable[[str], torch.Tensor], floats: Container[str] | None = None,
          looks: bool = True) -> Judgement:
    """Returns what is wrong with a file, or with the weights of a model.

    Args:
        headers: name -> dtype and shape of each tensor as stored, or the tensor.
        metadata: of the file, with its config's `CONFIG_KEY`.
        sample: returns a tensor, of which a few values are read.
        floats: names of the weights that a model has as floats, which takes no scales beside them;
            None: it is a file, whose codes have scales that a reader finds.
        looks: whether values of floats are looked at too.
    """
    file = _File(headers, metadata, sample, floats, looks)
    return Judgement(next(file.refusals(), None), tuple(file.told()) if looks else (),
                     bool(file.int8 or file.lost_marks))


@contextlib.contextmanager
def judged(file: WeightFile, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Sets a file's `judgement` by its tensors as stored, which the block reads; where that fails,
    a refusal comes before what a reader of other writers' files says, but for codes without scales,
    of which the reader that knows their writer says more."""
    config = {CONFIG_KEY: file.quantization} if file.quantization else {}
    file.judgement = judge(tensors, {**file.metadata, **config}, tensors.__getitem__)
    try:
        yield
    except WeightFileError:
        if file.judgement.refused is not None and CODES not in file.judgement.refused.problem:
            file.judgement.reject(file.error_at)
        raise


class _File:
    """What `judge` takes, and what it finds."""

    def __init__(self, headers: Mapping[str, Any], metadata: Mapping[str, Any],
                 sample: Callable[[str], torch.Tensor], floats: Container[str] | None, looks: bool):
        self.headers, self.metadata, self._sample = headers, metadata, sample
        self.floats, self.looks = floats, looks
        self.plain = {name: header for name, header in headers.items()
                      if header.dtype is not None and not isinstance(header, QuantizedTensor)}
        marked = marked_layers(metadata, headers)
        layers = () if any(f"{layer}.weight" in headers for layer in marked) else (
            dict.fromkeys(scaled_layers(headers, (SCALE, OLD_SCALE[1:]))))
        # layers with codes and scales in a file that marks none of its own
        self.unmarked = {
            layer: weight for layer in layers for weight in [headers[f"{layer}.weight"]]
            if len(weight.shape) > 1 and weight.dtype in (torch.int8, torch.uint8, *FP8)}
        # metadata may hold a tokenizer of megabytes, which only such layers make worth reading
        self.lost_marks = list(self._lost_marks()) if self.unmarked else []
        # those that may have lost that their columns are rotated
        self.int8 = [] if CONFIG_KEY in metadata else [
            layer for layer, weight in self.unmarked.items() if weight.dtype == torch.int8]

    def sample(self, name: str) -> torch.Tensor:
        """Returns a tensor, an empty one where there are no values, on the device "meta"."""
        tensor = self._sample(name)
        return torch.empty(0, dtype=tensor.dtype) if tensor.is_meta else tensor

    def refusals(self) -> Iterator[Refusal]:
        yield from self._contradictions()
        yield from self.lost_marks
        parts: dict[str, set[str]] = {}
        for name in self.headers:
            layer, _, part = name.rpartition(".")
            parts.setdefault(layer, set()).add(part)
        codes, whole = [], []
        for name, header in self.plain.items():
            layer, _, part = name.rpartition(".")
            if f"{layer}{MARK}" in self.headers or (
                    self.floats is None and (name in parts or parts[layer] - BESIDE)):
                continue
            is_matrix = part.endswith("weight") and len(header.shape) > 1
            if is_matrix and self._are_codes(name, header.dtype):
                codes.append(name)
            elif not (header.dtype.is_floating_point or header.dtype.is_complex) and (
                    part in FLOATS if self.floats is None else name in self.floats):
                whole.append(name)
        if codes:
            others = f", and so do {len(codes) - 1} more" if codes[1:] else ""
            yield _refusal(codes[0], f"{CODES}{others}")
        for name in whole:
            kind = str(self.headers[name].dtype).removeprefix("torch.")
            yield _refusal(name, f"is {kind} {tuple(self.headers[name].shape)}, expected floats")
        for name, header in self.plain.items():
            part = name.rpartition(".")[2]
            if "scale" in part and part not in BESIDE and header.dtype.is_floating_point and (
                    math.prod(header.shape) <= MOST_SCALES) and not (
                    self.sample(name).reshape(-1).float().isfinite().all()):
                yield _refusal(name, "is not finite")

    def _are_codes(self, name: str, dtype: torch.dtype) -> bool:
        """Returns whether a matrix without scales holds codes, or floats that a tool made of them.
        """
        if not dtype.is_floating_point or TABLE.search(name):
            return dtype in (torch.int8, torch.uint8)
        if dtype not in FP8 and not self.looks:
            return False
        values = self.sample(name).reshape(-1)
        values = torch.cat([values[:FIRST_VALUES], values[-FIRST_VALUES:]]).float()
        if not values.numel() or not values.square().mean() > MAX_UNSCALED**2 or dtype in FP8:
            return dtype in FP8 and bool(values.square().mean() > MAX_UNSCALED**2)
        are_whole = bool((values == values.round()).all() and (values.abs() < 256).all())
        return len(values.unique()) >= FEWEST_CODES and (are_whole or any(
            torch.equal(values.to(kind).float(), values) for kind in FP8))

    def _contradictions(self) -> Iterator[Refusal]:
        """Yields layers that metadata and mark describe otherwise."""
        listed: dict[str, Any] = {}
        with contextlib.suppress(MarkError):  # what reads the layers says so
            listed = listed_layers(self.metadata, self.headers)
        for layer, settings in listed.items():
            if f"{layer}{MARK}" not in self.headers or not isinstance(settings, dict):
                continue
            with contextlib.suppress(MarkError, RuntimeError):  # likewise
                marked = read_mark(bytes_of(self.sample(f"{layer}{MARK}")))
                given, said = ((format_of(each), is_rotated(each)) for each in (settings, marked))
                if given != said:
                    by = [f"in {safe_repr(name)}{' with rotated columns' if turned else ''}"
                          for name, turned in (given, said)]
                    yield _refusal(f"{layer}.weight", f"is {by[0]} by its metadata and {by[1]} by"
                                   " its comfy_quant", "Get another conversion.")

    def _lost_marks(self) -> Iterator[Refusal]:
        """Yields a layer that means another weight by the mark that it must have lost."""
        if any(ROTATED_TEXT.search(f"{key}: {text}")
               for key, text in self.metadata.items() if key != CONFIG_KEY):
            for layer in self.unmarked:
                yield _refusal(layer, "has no comfy_quant, and the metadata says that columns are"
                               " rotated", GET_ORIGINAL)
        layers = {}  # -> shapes of the scales in rows and in tiles, and of those that it has
        for layer, weight in self.unmarked.items():
            if weight.dtype == torch.uint8 and (
                    {f"{layer}.{SCALE}", f"{layer}.{SCALE_2}"} <= self.headers.keys()):
                shapes, scale = nvfp4_scale_shapes(weight.shape), self.headers[f"{layer}.{SCALE}"]
                if tuple(scale.shape) in shapes:
                    layers[layer] = (*shapes, tuple(scale.shape))
        if CONFIG_KEY in self.metadata or any(
                f"{layer}.input_scale" in self.headers for layer in layers) or any(
                shape == in_rows != in_tiles for in_rows, in_tiles, shape in layers.values()):
            return  # as other writers have it
        for layer in layers:
            yield _refusal(layer, "is in nvfp4 without its comfy_quant, which says in which order"
                           " its codes and scales are", GET_ORIGINAL)

    def told(self) -> Iterator[str]:
        if self.int8:
            are, have = ("are", "have") if self.int8[1:] else ("is", "has")
            yield (f"{join_some(map(safe_repr, self.int8))} {have} no comfy_quant and no other"
                   f" mark, and {are} read as int8 that is not rotated. If images are noise, the"
                   f" file has lost its header. {GET_ORIGINAL}")
        matrices = [name for name, header in self.headers.items() if len(header.shape) > 1
                    and (header.dtype is None or header.dtype.is_floating_point)
                    and not OFTEN_ZEROS.search(name)]
        zeros = [name for name in matrices if _is_zeros(self.sample(name), slice(FIRST_BYTES))
                 and _is_zeros(self.sample(name), slice(None))]
        if zeros:
            yield (f"{join_some(map(safe_repr, zeros))} {'hold' if zeros[1:] else 'holds'} nothing"
                   f" but zeros{BROKEN}")
        elif matrices and not TABLE.search(matrices[-1]) and (
                math.prod(self.headers[matrices[-1]].shape) > 2 * LAST_BYTES) and _is_zeros(
                self.sample(matrices[-1]), slice(-LAST_BYTES, None)):
            yield f"{safe_repr(matrices[-1])}, the last of the file, ends in zeros{BROKEN}"


def _refusal(name: str, problem: str, advice: str = DOWNLOAD_AGAIN) -> Refusal:
    return Refusal(name, f"{safe_repr(name)} {problem}", advice)


def _is_zeros(tensor: torch.Tensor, part: slice) -> bool:
    """Returns whether bytes of a matrix or kernel in memory, packed or not, are all zeros."""
    data = packed_tensors(tensor)[0] if is_packed(tensor) else tensor
    if isinstance(data, QuantizedTensor) or data.device.type != "cpu" or (
            not data.is_contiguous() or not data.numel()):
        return False
    return not data.view(-1).view(torch.uint8)[part].any()
