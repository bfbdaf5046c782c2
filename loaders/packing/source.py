"""What is to be saved: the weights of a model, text encoder or file, one at a time in float32, with everything that is on them.

Names are the host's without prefix. Nothing is unpacked, patched or read before it is asked for.
"""
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...ops.patcher import values as patched_values
from ...ops.patcher.values import Patch
from ...ops.tensor import QuantizedTensor, is_packed, packed_tensors
from ..files import open_weights
from ..files.container import PLAIN_DTYPES, FileChangeGuard, WeightFileError
from ..recipe import Recipe

PLAIN_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
DIFFUSION_MODEL = "diffusion_model."
# Encoders, by how the host's names for them begin, that it knows in a file by other names than those in its model.
NAMES_IN_FILES = {
    "qwen35_": {"model": "model.language_model", "visual": "model.visual"},
    "qwen3vl_4b": {"visual": "model.visual"}, "qwen3vl_8b": {"visual": "model.visual"},
}


@dataclass
class Weight:
    """One tensor of a model.

    name: in the host's names without prefix; key: in the model. shape: with its patches. tensor: as held, without patches.
    read: first row, end row -> these rows without patches, float32. patches: the host's, in order. is_whole: whether `tensor`
    is all of it; else it is a part, of the same dtype.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    read: Callable[[int, int], torch.Tensor]
    patches: Sequence[Patch] = ()
    is_whole: bool = True

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def held_as(self) -> str:
        """The type it is held in: a key of `FORMATS`, a plain type's name, or what the host calls one of its own."""
        if is_packed(self.tensor):
            return self.tensor.layout_cls.format.__name__
        if isinstance(self.tensor, QuantizedTensor):
            return self.tensor._layout_cls.removeprefix("TensorCore").removesuffix("Layout")
        return PLAIN_NAMES.get(self.tensor.dtype, str(self.tensor.dtype).removeprefix("torch."))

    @property
    def is_number(self) -> bool:
        """Whether it may be written in another type: whole numbers and markers without values are not."""
        return self.tensor.dtype.is_floating_point and self.values > 0

    def as_held(self) -> torch.Tensor:
        """The tensor itself on the CPU, to be written bit for bit; packed 16-bit numbers as plain ones."""
        tensor = self.tensor.detach()
        if not is_packed(tensor):
            return tensor.cpu()
        packed_format = tensor.layout_cls.format
        if packed_format.plain_dtype is None:
            return tensor.to("cpu")
        return packed_tensors(tensor)[0].cpu().contiguous().view(packed_format.plain_dtype).view(self.shape)

    def slices(self, most: int) -> list[tuple[int, int]]:
        """Rows [first, end) of at most about `most` values each, whole blocks of every format; all of them where it must be."""
        rows = self.shape[0] if self.shape else 1
        whole = self.values <= most or len(self.shape) < 2 or (
            self.patches and patched_values.rows_of_patches(self.patches, 0, 1) is None)
        # Blocks of NF4 run on over the rows; 64 rows are whole blocks of all of them.
        step = rows if whole else max(1, most // (self.values // rows) // 64) * 64
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def patched(self, start: int, stop: int, patches: Sequence[Patch] | None = None,
                values: torch.Tensor | None = None) -> torch.Tensor:
        """Rows with the patches in them, float32. patches: only these; values: on these in place of the weight's own."""
        patches = self.patches if patches is None else patches
        values = self.read(start, stop) if values is None else values
        if patches and (start, stop) != (0, self.shape[0] if self.shape else 1):
            patches = patched_values.rows_of_patches(patches, start, stop)
        return patched_values.apply(patches, values, self.key) if patches else values


@dataclass
class Source:
    """A model to be saved. title: what it is, for people. notes: what people should know of what will not be in the file.

    guard: raises where a file is written to that weights are still to be read from. paths: of the files that they were loaded
    of, none of which a new file may replace.
    """

    title: str
    weights: dict[str, Weight]
    device: torch.device = torch.device("cpu")
    notes: list[str] = field(default_factory=list)
    let_go: Callable[[], None] = lambda: None
    guard: Callable[[], None] = lambda: None
    paths: Collection[Path] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that may be written in another type."""
        return {name: weight.shape for name, weight in self.weights.items() if weight.is_number}

    @property
    def touched(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight.patches]


def of_model(patcher, title: str = "model") -> Source:
    """A MODEL: the host's ModelPatcher, packed by this pack or ordinary, with its patches."""
    weights = _weights_of(patcher, DIFFUSION_MODEL)
    for name, tensor in _markers(patcher).items():
        weights.setdefault(name, _as_it_is(name, tensor))
    return _source(title, weights, patcher)


def of_encoders(clip, title: str = "text encoder") -> dict[str, Source]:
    """A CLIP: each encoder in it by its name in the host ("clip_l", "t5xxl"), as the host's own CLIPSave divides them.

    Beside its weights stands what the host builds its tokenizer from, where the host has none of its own for it.
    """
    weights = _weights_of(clip.patcher, "")
    parts: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".transformer.")
        if not rest:  # settings of the host beside an encoder
            part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = weight
    parts = {part: _named(part, found) for part, found in parts.items()
             if any(len(weight.shape) > 1 for weight in found.values())}
    for part, found in parts.items():
        tokenizer = clip.tokenizer if len(parts) == 1 else getattr(clip.tokenizer, part, None)
        found |= {name: _as_it_is(name, tensor) for name, tensor in _contents(tokenizer).items()}
    return {part: _source(f"{title} {part}", found, clip.patcher) for part, found in parts.items()}


def _source(title: str, weights: dict[str, Weight], patcher) -> Source:
    guard = FileChangeGuard.of(weight.tensor for weight in weights.values())
    paths = {path for path, _ in guard.files}.union(*map(_files_at, _paths_loaded_of(patcher)))
    return Source(title, weights, patcher.load_device, guard=guard, paths=paths)


def _paths_loaded_of(patcher) -> list[str]:
    """Return the paths among what the host keeps beside a model to load it again by."""
    load, arguments, *_ = patcher.cached_patcher_init or (None, ())
    values = [*load.paths, *load.options.values()] if isinstance(load, Recipe) else arguments
    values = [part for value in values for part in (value if isinstance(value, (list, tuple)) else (value,))]
    return [value for value in values if isinstance(value, str) and os.path.exists(value)]


def _files_at(path: str) -> Collection[Path]:
    """Return the files of the model at a path, all parts of a split one."""
    try:
        return open_weights(path).paths
    except WeightFileError:
        return (Path(path),)


def _weights_of(patcher, prefix: str) -> dict[str, Weight]:
    weights = {}
    for key in patched_values.weight_names(patcher, prefix):
        name = key.removeprefix(prefix)
        weights[name] = Weight(name, key, tuple(patched_values.patched_shape(patcher, key)),
                               patched_values.held_weight(patcher, key), patched_values.reader(patcher, key),
                               tuple(patched_values.patches_of(patcher, key)))
    return weights


def _as_it_is(name: str, tensor: torch.Tensor) -> Weight:
    """A tensor that stands in the file beside the model's weights."""
    return Weight(name, name, tuple(tensor.shape), tensor, lambda start, stop: tensor)


def _named(part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights of an encoder under the names by which the host knows its file again."""
    changes = next((changes for start, changes in NAMES_IN_FILES.items() if part.startswith(start)), {})
    named = {}
    for name, weight in weights.items():
        start, dot, rest = name.partition(".")
        weight.name = f"{changes.get(start, start)}{dot}{rest}"
        named[weight.name] = weight
    return named


def _contents(tokenizer) -> dict[str, torch.Tensor]:
    """Name in files -> bytes (uint8) of what the host builds a tokenizer from, as its own CLIPSave writes them."""
    state = {} if tokenizer is None else tokenizer.state_dict()
    return {name: _bytes_of(value) for name, value in state.items() if value is not None}


def _bytes_of(value: torch.Tensor | bytes | str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.cpu().to(torch.uint8)
    return torch.frombuffer(bytearray(value.encode() if isinstance(value, str) else value), dtype=torch.uint8)


def _markers(patcher) -> Mapping[str, torch.Tensor]:
    """What the host tells kinds of one architecture by, as its own CheckpointSave writes it."""
    kind = getattr(getattr(patcher.model, "model_type", None), "name", "")
    sampling = patcher.get_model_object("model_sampling") if hasattr(patcher.model, "model_sampling") else None
    markers = {"v_pred": torch.empty(0, dtype=torch.float32)} if kind == "V_PREDICTION" else {}
    if kind == "V_PREDICTION" and getattr(sampling, "zsnr", False):
        markers["ztsnr"] = torch.empty(0, dtype=torch.float32)
    if kind == "V_PREDICTION_EDM":
        markers |= {f"edm_vpred.{name}": torch.tensor(float(getattr(sampling, name)), dtype=torch.float32)
                    for name in ("sigma_max", "sigma_min")}
    return markers
