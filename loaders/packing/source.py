"""What is to be saved: the weights of a model, text encoder or file, one at a time in float32, with
everything that is on them.

Names are the host's without prefix. Nothing is dequantised, patched or read before it is asked for.
Of a file the host's model is built without values, on the meta device, where LoRAs need to know its
layers.
"""
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import torch

from ...ops.packed_layout import QuantizedTensor, is_packed, packed_tensors
from ...ops.packed_tensor import relabel
from ...ops.patcher import patched_weights as patched_values
from ...ops.patcher.patched_weights import Patch
from ...ops.row_slicing import take_rows
from ..comfy_keys import model_prefix, to_comfy_keys
from ..comfy_quant import SMOOTHING, as_tensors
from ..detection import reject_non_diffusion, try_detect
from ..diffusers_keys import JoinedRows
from ..files import open_weights
from ..files.container import FileChangeGuard, WeightFileError, map_file
from ..model_summary import format_name
from ..recipe import Recipe
from ..wording import join_some
from .planning.packing_rules import half_type

DIFFUSION_MODEL = "diffusion_model."
# Encoders, by how the host's names for them begin, that it knows in a file by other names than
# those in its model.
NAMES_IN_FILES = {
    "qwen35_": {"model": "model.language_model", "visual": "model.visual"},
    "qwen3vl_4b": {"visual": "model.visual"}, "qwen3vl_8b": {"visual": "model.visual"},
}
# What tells kinds of one architecture, beside the model's weights in a whole checkpoint; the host
# reads them in a model's file.
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
ADVICE = "Take it off, or put it behind the loader of the new file instead."


class SaveError(ValueError):
    """A model that cannot be saved as asked. The message says what is in the way and what to do."""


@dataclass
class Weight:
    """One tensor of a model.

    name: in the host's names without prefix; key: in the model. shape: with its patches. tensor: as
    held, without patches.
    read: first row, end row -> these rows without patches, float32. patches: the host's, in order.
    is_whole: whether `tensor` is all of it; else it is a part, of the same dtype.
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
        """The type it is held in: a key of `FORMATS`, a plain type's name, or what the host calls
        one of its own."""
        return format_name(self.tensor)

    @property
    def half(self) -> str:
        """The 16-bit type for its values where it is not packed."""
        return half_type(torch.float32 if is_packed(self.tensor) else self.tensor.dtype)

    @property
    def is_number(self) -> bool:
        """Whether it may be written in another type: whole numbers and markers without values are
        not."""
        return self.tensor.dtype.is_floating_point and self.values > 0

    def as_held(self) -> torch.Tensor:
        """The tensor itself on the CPU, to be written bit for bit; packed 16-bit numbers as plain
        ones."""
        tensor = self.tensor.detach()
        if not is_packed(tensor):
            return tensor.cpu()
        packed_format = tensor.layout_cls.format
        if packed_format.plain_dtype is None:
            return tensor.to("cpu")
        return packed_tensors(tensor)[0].cpu().contiguous().view(packed_format.plain_dtype).view(
            self.shape)

    def slices(self, most: int) -> list[tuple[int, int]]:
        """Rows [first, end) of at most about `most` values each, whole blocks of every format; all
        of them where it must be."""
        rows = self.shape[0] if self.shape else 1
        whole = self.values <= most or len(self.shape) < 2 or (
            self.patches and patched_values.slice_patches(self.patches, 0, 1) is None)
        # Blocks of NF4 run on over the rows; 64 rows are whole blocks of all of them.
        step = rows if whole else max(1, most // (self.values // rows) // 64) * 64
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def patched(self, start: int, stop: int, patches: Sequence[Patch] | None = None,
                values: torch.Tensor | None = None) -> torch.Tensor:
        """Rows with the patches in them, float32. patches: only these; values: on these in place of
        the weight's own."""
        patches = self.patches if patches is None else patches
        values = self.read(start, stop) if values is None else values
        if patches and (start, stop) != (0, self.shape[0] if self.shape else 1):
            patches = patched_values.slice_patches(patches, start, stop)
        return patched_values.apply_patches(patches, values, self.key) if patches else values


@dataclass
class Source:
    """A model to be saved. title: what it is, for people. notes: what people should know of what
    will not be in the file.

    guard: raises where a file is written to that weights are still to be read from. paths: of the
    files that they were loaded of, none of which a new file may replace.
    """

    title: str
    weights: dict[str, Weight]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    drop_pages: Callable[[], None] = lambda: None
    guard: Callable[[], None] = lambda: None
    paths: Collection[Path] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights that may be written in another type."""
        return {name: weight.shape for name, weight in self.weights.items() if weight.is_number}

    @property
    def halves(self) -> dict[str, str]:
        """Of the same weights the 16-bit types."""
        return {name: self.weights[name].half for name in self.shapes}

    @property
    def touched(self) -> list[str]:
        """Names of the weights with patches."""
        return [name for name, weight in self.weights.items() if weight.patches]


def source_of_model(patcher, title: str = "model") -> Source:
    """A MODEL: the host's ModelPatcher, packed by this pack or ordinary, with its patches."""
    weights = _weights_of(patcher, DIFFUSION_MODEL)
    for name, tensor in _markers(patcher).items():
        weights.setdefault(name, _as_it_is(name, tensor))
    return _source(title, weights, patcher)


def source_of_encoders(clip, title: str = "text encoder") -> dict[str, Source]:
    """A CLIP: each encoder in it by its name in the host ("clip_l", "t5xxl"), as the host's own
    CLIPSave divides them.

    Beside its weights stands what the host builds its tokenizer from, where the host has none of
    its own for it.
    """
    weights = _weights_of(clip.patcher, "")
    parts: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".transformer.")
        if not rest:  # settings of the host beside an encoder
            part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = weight
    parts = {part: _named(part, of_part) for part, of_part in parts.items()
             if any(len(weight.shape) > 1 for weight in of_part.values())}
    for part, of_part in parts.items():
        tokenizer = clip.tokenizer if len(parts) == 1 else getattr(clip.tokenizer, part, None)
        of_part |= {name: _as_it_is(name, tensor) for name, tensor in _contents(tokenizer).items()}
    return {
        part: _source(f"{title} {part}", of_part, clip.patcher) for part, of_part in parts.items()
    }


def _source(title: str, weights: dict[str, Weight], patcher) -> Source:
    guard = FileChangeGuard.of(weight.tensor for weight in weights.values())
    paths = {path for path, _ in guard.files}.union(*map(_files_at, _paths_loaded_of(patcher)))
    return Source(title, weights, patcher.load_device, guard=guard, paths=paths)


def _paths_loaded_of(patcher) -> list[str]:
    """Return the paths among what the host keeps beside a model to load it again by."""
    load, arguments, *_ = patcher.cached_patcher_init or (None, ())
    values = [*load.paths, *load.options.values()] if isinstance(load, Recipe) else arguments
    values = [
        part for value in values
        for part in (value if isinstance(value, (list, tuple)) else (value,))
    ]
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
                               patched_values.unpatched_weight(patcher, key),
                               patched_values.row_reader(patcher, key),
                               tuple(patched_values.effective_patches(patcher, key)))
    return weights


def _as_it_is(name: str, tensor: torch.Tensor) -> Weight:
    """A tensor that stands in the file beside the model's weights."""
    return Weight(name, name, tuple(tensor.shape), tensor, lambda start, stop: tensor)


def _named(part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights of an encoder under the names by which the host knows its file again."""
    changes = next((changes for start, changes in NAMES_IN_FILES.items() if part.startswith(start)),
                   {})
    named = {}
    for name, weight in weights.items():
        start, dot, rest = name.partition(".")
        weight.name = f"{changes.get(start, start)}{dot}{rest}"
        named[weight.name] = weight
    return named


def _contents(tokenizer) -> dict[str, torch.Tensor]:
    """Name in files -> bytes (uint8) of what the host builds a tokenizer from, as its own CLIPSave
    writes them."""
    state = {} if tokenizer is None else tokenizer.state_dict()
    return {name: _bytes_of(value) for name, value in state.items() if value is not None}


def _bytes_of(value: torch.Tensor | bytes | str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.cpu().to(torch.uint8)
    return torch.frombuffer(bytearray(value.encode() if isinstance(value, str) else value),
                            dtype=torch.uint8)


def _markers(patcher) -> Mapping[str, torch.Tensor]:
    """What the host tells kinds of one architecture by, as its own CheckpointSave writes it."""
    kind = getattr(getattr(patcher.model, "model_type", None), "name", "")
    sampling = (
        patcher.get_model_object("model_sampling")
        if hasattr(patcher.model, "model_sampling")
        else None
    )
    markers = {"v_pred": torch.empty(0, dtype=torch.float32)} if kind == "V_PREDICTION" else {}
    if kind == "V_PREDICTION" and getattr(sampling, "zsnr", False):
        markers["ztsnr"] = torch.empty(0, dtype=torch.float32)
    if kind == "V_PREDICTION_EDM":
        markers |= {
            f"edm_vpred.{name}": torch.tensor(float(getattr(sampling, name)), dtype=torch.float32)
            for name in ("sigma_max", "sigma_min")
        }
    return markers


def source_of_file(path: str | os.PathLike, loras: Sequence[tuple[str, float]] = ()) -> Source:
    """The diffusion model in a file or folder, of a whole checkpoint that alone. loras: (path,
    strength), in order.

    Raises WeightFileError and SaveError.
    """
    file = open_weights(path)
    reject_non_diffusion(file)
    guard = file.guard + FileChangeGuard.over(map_file(lora) for lora, _ in loras)
    state_dict = file.state_dict()
    prefix = model_prefix(state_dict)
    markers = {name: state_dict[name] for name in MARKERS if name in state_dict}
    state_dict = as_tensors(
        file, {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)},
        prefix)
    tensors = to_comfy_keys(
        {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}, later=True)
    tensors |= markers
    smoothings = {
        name.removesuffix(SMOOTHING): tensors.pop(name) for name in list(tensors)
        if name.endswith(SMOOTHING)
    }
    model = try_detect(_empty_model, tensors) if loras else None
    patches, notes = _patches_of(model, loras, os.path.basename(path)) if loras else ({}, [])
    weights = {
        name: _weight_of_file(name, tensor, smoothings.get(name.removesuffix(".weight")),
                              patches.get(name, ())) for name, tensor in tensors.items()
        if not name.endswith((".input_scale", ".scale_input"))
    }
    missing = patches.keys() - weights.keys()
    if missing:
        raise SaveError(
            f"{os.path.basename(path)} has no {min(missing)}, which a LoRA changes. Get another"
            " conversion of the model.")
    return Source(os.path.basename(path), weights, notes=notes, drop_pages=file.drop_pages, guard=guard,
                  paths=(*file.paths, *(Path(lora) for lora, _ in loras)))


def _weight_of_file(name: str, tensor, smoothing: torch.Tensor | None,
                    patches: Sequence[Patch]) -> Weight:
    joined = isinstance(tensor, JoinedRows)
    held = tensor.parts[0][0] if joined else tensor

    def read(start: int, stop: int) -> torch.Tensor:
        if joined:
            return _joined(tensor, start, stop)
        values = _rows(tensor, start, stop)
        return values if smoothing is None else values * smoothing.float()

    return Weight(name, f"{DIFFUSION_MODEL}{name}", tuple(tensor.shape), held, read, tuple(patches),
                  is_whole=not joined and smoothing is None)


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows in float32, a copy."""
    if is_packed(tensor):
        part = take_rows(relabel(tensor, dtype=torch.float32), slice(start, stop))
        return part.dequantize() if is_packed(part) else part.clone()
    if isinstance(tensor, QuantizedTensor):
        return relabel(tensor, dtype=torch.float32).dequantize()[start:stop].clone()
    return (tensor[start:stop] if tensor.ndim else tensor).to(torch.float32, copy=True)


def _joined(rows: JoinedRows, start: int, stop: int) -> torch.Tensor:
    parts, at = [], 0
    for tensor, first, last in rows.parts:
        low, high = max(start - at, 0), min(stop - at, last - first)
        if low < high:
            parts.append(_rows(tensor, first + low, first + high))
        at += last - first
    return torch.cat(parts)


def _empty_model(tensors) -> comfy.model_patcher.ModelPatcher | None:
    """The host's model for these names and shapes, without values; None where it knows none."""
    shapes = {
        name: torch.empty(tensor.shape, dtype=torch.float32, device="meta")
        for name, tensor in tensors.items()
    }
    config = comfy.model_detection.model_config_from_unet(shapes, "")
    if config is None:
        return None
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model(shapes, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _patches_of(model, loras: Sequence[tuple[str, float]],
                name: str) -> tuple[dict[str, list[Patch]], list[str]]:
    """(name of a weight -> the host's patches for it, what people should know of LoRAs that fit in
    part)."""
    if model is None:
        raise SaveError(
            f"{name} is no model that this ComfyUI knows, so it cannot be told which layers a LoRA"
            " is for. Update ComfyUI, or save it without a LoRA.")
    # Here, so that a model is saved on a ComfyUI without what LoRAs need.
    from ..lora.apply import apply_lora
    from ..lora.compatibility import check_lora
    from ..lora.lora_file import load_lora_file

    notes = []
    for path, strength in loras:
        report = check_lora(model, None, *load_lora_file(path), measure=False)
        if report.fits == "no":
            raise SaveError(f"{os.path.basename(path)} is not applied. {report.verdict}")
        if report.fits != "yes":
            notes.append(f"{os.path.basename(path)}: {report.verdict}")
        model, _ = apply_lora(model, None, report, strength, 0)
    return {
        key.removeprefix(DIFFUSION_MODEL): patches for key, patches in model.patches.items()
    }, notes


def check_saveable(patcher):
    """Raise SaveError for what changes weights while the model runs and would be lost without a
    word."""
    if patcher.injections:
        raise SaveError(
            f"The model has {join_some(patcher.injections)} put into it while it runs, as a bypass"
            " LoRA is, which no file can hold. Load the LoRA with Load LoRA or Apply LoRA"
            " (Featherweight) instead."
        )
    if patcher.hook_patches or patcher.forced_hooks or patcher.hook_backup:
        raise SaveError(
            "The model has LoRA hooks, whose strength follows a schedule; a file holds one"
            " strength. Load the LoRA with Load LoRA or Apply LoRA (Featherweight) instead.")
    if patcher.weight_wrapper_patches:
        raise SaveError(
            f"Functions of another node change the weights"
            f" {join_some(patcher.weight_wrapper_patches)} while the model runs, which no file can"
            f" hold. {ADVICE}")
    replaced = [
        name for name, value in patcher.object_patches.items()
        if name.startswith("diffusion_model") and (
            hasattr(value, "forward") or hasattr(value, "shape"))
    ]
    if replaced:
        raise SaveError(
            f"Another node has put parts of its own in the place of {join_some(replaced)}, which"
            f" no file can hold. {ADVICE}")


def unsaved_parts(patcher) -> list[str]:
    """Names of what else is on a model, and does not change its weights: a file of weights has no
    place for it."""
    options = patcher.model_options
    names = [*patcher.object_patches]
    names += [name for name, value in options.items() if name != "transformer_options" and value]
    for name, value in options.get("transformer_options", {}).items():
        if isinstance(value, dict):
            names += [f"{name}: {part}" for part in value if value[part]]
        elif value:
            names.append(name)
    names += [
        f"{kind}: {key}" for kind, of_kind in patcher.wrappers.items()
        for key, value in of_kind.items() if value
    ]
    return list(dict.fromkeys(map(str, names)))
