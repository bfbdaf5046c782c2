"""Reads the weights of a model, text encoder or file that is to be saved, with patches, in float32.

Names are the host's without prefix. A weight is read, dequantized and patched only when its rows
are requested. For a LoRA on a file, the host's model is built on the meta device, which tells the
LoRA's layers.
"""
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ...ops.layers import cpu_attention
from ...ops.patcher import patched_weights as patched_values
from ...ops.patcher.patched_weights import Patch
from ...ops.stable_names import short_error_name
from ...ops.tensor.packed_layout import (
    QuantizedTensor,
    is_packed,
    plain_dtype_of,
    plain_tensor,
    reshape_to,
)
from ...ops.tensor.packed_tensor import relabel
from ...ops.tensor.row_slicing import take_rows
from ..comfyui.comfy_quant_weights import as_tensors, packed_of_host, read_marked
from ..comfyui.detection import try_detect
from ..comfyui.diffusers_keys import JoinedRows
from ..comfyui.model_summary import format_name
from ..comfyui.module_files import module_layers
from ..comfyui.weight_keys import model_prefix, to_comfy_keys
from ..container.weight_file import (
    FileChangeGuard,
    WeightFile,
    WeightFileError,
    first_line,
    map_file,
)
from ..files.diffusers_folder import MODEL_FOLDERS
from ..files.open_weights import open_weights
from ..lora.seedvr2 import add_texts
from ..name_lists import join_some
from ..packing_rules import half_type
from ..quantizers.comfy_quant import row_type_of
from ..recipe import Recipe, model_paths
from ..refusals.foreign_weights import reject_foreign_weights
from ..refusals.wrong_kind import SIDE_MODELS, first_match, reject_non_diffusion

DIFFUSION_MODEL = "diffusion_model."
# Start of the host's name of an encoder -> first parts of names in its model -> in files, for
# encoders that the host does not recognise in a file by the names in its model.
NAMES_IN_FILES = {
    "qwen35_": {"model": "model.language_model", "visual": "model.visual"},
    "qwen3vl_4b": {"visual": "model.visual"}, "qwen3vl_8b": {"visual": "model.visual"},
}
# Tensors in a whole checkpoint, next to the model's weights, that tell variants of an architecture
# apart; the host reads them in a model's file as well.
MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
# Metadata from which the host takes sizes of a diffusion model (LTX-2, Wan).
CONFIG = "config"
# Metadata of a file that says how that file is packed.
NOT_KEPT = ("general.", "featherweight.", "quantization", "_quantization")
INPUT_SCALES = (".input_scale", ".scale_input")  # which are not of a weight
ADVICE = "Remove it, or put it after the loader of the new file instead."
BLOCK_ROWS = 64  # rows are whole blocks of every format: those of NF4 continue from row to row
COMPARED = 1 << 14  # values of a weight by which a file is known to be the one it was loaded from


@short_error_name
class SaveError(ValueError):
    """Raised for a model that cannot be saved; the message says why and what to do."""


@dataclass
class Weight:
    """One tensor of a model.

    Attributes:
        name: the host's, without prefix.
        key: the host's, in the model.
        shape: with its patches.
        tensor: as stored, without patches.
        read: (first row, end row) -> these rows without patches, float32.
        patches: the host's, in order.
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
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The number of its rows, 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def stored_type(self) -> str:
        """Its type: a key of FORMATS or ROW_TYPES, a plain type, or the host's name of its own."""
        return row_type_of(self.tensor) or format_name(self.tensor)

    @property
    def half(self) -> str:
        """The 16-bit type for its values where it is not packed."""
        return half_type(torch.float32 if is_packed(self.tensor) else self.tensor.dtype)

    @property
    def is_number(self) -> bool:
        """Whether it may be written in another type, unlike integers and markers without values."""
        return self.tensor.dtype.is_floating_point and self.values > 0

    def is_copied(self, type_name: str) -> bool:
        """Returns whether it is written bit for bit as it is stored, in a file's type for it."""
        return self.is_whole and not self.patches and self.stored_type == type_name

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The dtype of its values, packed 16 bits as plain ones; None for a quantised weight."""
        return plain_dtype_of(self.tensor)

    def stored_tensor(self) -> torch.Tensor:
        """Returns the tensor on the CPU, to be copied bit for bit; packed 16 bits as plain ones."""
        return plain_tensor(self.tensor.detach()).to("cpu")

    def slices(self, max_values: int) -> list[tuple[int, int]]:
        """Splits the rows into slices of about `max_values` values, whole blocks of every format.

        A patch that applies only to a whole weight makes it one slice.

        Returns:
            (first row, end row) of each slice.
        """
        rows = self.rows
        is_one = self.values <= max_values or len(self.shape) < 2 or (
            self.patches and patched_values.slice_patches(self.patches, 0, 1) is None)
        step = rows if is_one else max(
            1, max_values // (self.values // rows) // BLOCK_ROWS) * BLOCK_ROWS
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def patched(self, start: int, stop: int, patches: Sequence[Patch] | None = None,
                values: torch.Tensor | None = None) -> torch.Tensor:
        """Returns patched rows, float32.

        Args:
            start, stop: first and end row.
            patches: to apply, None for all.
            values: of the rows, to apply them to, None for the weight's own.
        """
        patches = self.patches if patches is None else patches
        values = self.read(start, stop) if values is None else values
        if patches and (start, stop) != (0, self.rows):
            patches = patched_values.slice_patches(patches, start, stop)
        return patched_values.apply_patches(patches, values, self.key) if patches else values


@dataclass
class Source:
    """A model to be saved.

    Attributes:
        weights: name -> weight.
        device: where weights are packed.
        notes: for people, on what the file will lack.
        drop_pages: releases mapped pages of files after a weight was read.
        guard: raises WeightFileError where a file of the weights was changed.
        paths: of the files they were loaded from, which a new file may not replace.
        metadata: texts that the host reads beside the weights.
        is_side_model: whether it is one of `SIDE_MODELS`.
        parts: of a whole checkpoint, next to its diffusion model; `weights` has theirs too.
        file_names: name -> name in a file, where they differ.
    """

    weights: dict[str, Weight]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=list)
    drop_pages: Callable[[], None] = lambda: None
    guard: Callable[[], None] = lambda: None
    paths: Collection[Path] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_side_model: bool = False
    parts: Sequence["CheckpointPart"] = ()
    file_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> "Source":
        """The diffusion model alone."""
        others = {name for part in self.parts for name in part.names.values()}
        weights = {name: weight for name, weight in self.weights.items() if name not in others}
        return replace(self, weights=weights, parts=()) if self.parts else self

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the weights that may be written in another type."""
        return {name: weight.shape for name, weight in self.weights.items() if weight.is_number}

    @property
    def halves(self) -> dict[str, str]:
        """Name -> 16-bit type of the same weights."""
        return {name: self.weights[name].half for name in self.shapes}

    @property
    def patched_names(self) -> list[str]:
        """Names of the weights with patches."""
        return [name for name, weight in self.weights.items() if weight.patches]


@dataclass
class CheckpointPart:
    """A text encoder of a whole checkpoint, or all that is never packed in it, such as the VAE.

    Attributes:
        source: with the names that its rules know.
        names: name in `source` -> name in the checkpoint.
        may_be_packed: whether the host reads it packed.
    """

    source: Source
    names: Mapping[str, str]
    may_be_packed: bool


def source_of_model(patcher) -> Source:
    """Returns the source of a MODEL, the host's ModelPatcher, packed or not, with its patches.

    Plain weights are those of the file that it was loaded from, whatever dtype the host has chosen
    for them. Where that file is no longer there, they are as the model holds them, and a note says
    so.
    """
    weights = _weights_of(patcher, DIFFUSION_MODEL)
    notes = []
    files = _open_again(patcher, notes)
    if files:
        notes += _take_from_files(weights, patcher, files)
    elif notes:
        notes = [_as_held(weights, _plain_names(weights), "; ".join(notes))]
    for name, tensor in _markers(patcher).items():
        weights.setdefault(name, extra_tensor(name, tensor))
    source = _source(weights, patcher)
    source.notes += [*notes, *_notes_on_merges(weights)]

    def drop_pages():
        for file in files:
            file.drop_pages()

    source.drop_pages = drop_pages
    for file in files:
        if CONFIG in file.text_metadata:
            source.metadata = {CONFIG: file.text_metadata[CONFIG]}
            break
    return source


def _open_again(patcher, notes: list[str]) -> list[WeightFile]:
    """Opens the files that the host or a recipe loads a model from, a module behind its model.

    notes: takes a clause for each file that cannot be opened; no file is returned then.
    """
    files = []
    for path in model_paths(patcher):
        name = os.path.basename(os.path.normpath(path))
        try:
            files.append(open_weights(_model_folder(path)))
        except WeightFileError as error:
            notes.append(f"{name} cannot be read again ({first_line(error)})"
                         if os.path.exists(path) else f"{name} is no longer there")
    return [] if notes else files


def _model_folder(path: str) -> str:
    """Returns the folder of the model in a diffusers pipeline; else the path itself."""
    folders = (os.path.join(path, name) for name in MODEL_FOLDERS)
    is_pipeline = not os.path.exists(os.path.join(path, "config.json"))
    return next((folder for folder in folders if is_pipeline and os.path.isdir(folder)), path)


def _plain_names(weights: Mapping[str, Weight]) -> list[str]:
    """Returns the names of the weights that a model does not hold in a quantised format."""
    return [name for name, weight in weights.items()
            if weight.is_number and weight.plain_dtype is not None]


def _as_held(weights: Mapping[str, Weight], names: Sequence[str], reason: str) -> str:
    """Returns a note on weights that are saved as the model holds them; reason: a clause."""
    types = dict.fromkeys(weights[name].stored_type for name in names)
    return (f"{len(names)} weights are saved as ComfyUI has them ({', '.join(types)}), not as"
            f" they were loaded: {reason} ({join_some(names)}).")


def _take_from_files(weights: dict[str, Weight], patcher, files: Sequence[WeightFile]) -> list[str]:
    """Makes the plain weights of a model those of its files, patches apart.

    Args:
        weights: of the model; is changed.
        patcher: of the model.
        files: of `_open_again`.

    Returns:
        Notes on weights that stay as the model holds them.
    """
    file, names = files[0], _plain_names(weights)
    file_types = {entry.format for file in files for entry in file.entries.values()}
    if len(file_types) == 1 and {weights[name].stored_type for name in names} <= file_types:
        return []  # nothing was rounded
    try:
        tensors = _in_the_hosts_names(file, read_marked(file))
        for module in files[1:]:
            layers = _in_the_hosts_names(module, read_marked(module))
            tensors |= module_layers(module, layers)
        config = try_detect(comfy.model_detection.detect_unet_config, tensors, "")
        add_texts(tensors, "", file.path, config)
    except WeightFileError as error:
        reason = f"{file.path.name} cannot be read again ({first_line(error)})"
        return [_as_held(weights, names, reason)]
    tensors = _in_the_model(tensors, patcher)
    missing, other = [], []
    for name in names:
        weight, tensor = weights[name], tensors.get(name)
        held = weight.tensor.shape
        if tensor is None:
            missing.append(name)
            continue
        if tensor.shape != held and tensor.shape.numel() == held.numel() and not isinstance(
                tensor, JoinedRows):
            tensor = reshape_to(tensor, held)
        if tensor.shape != held or not _is_rounded_to(tensor, weight):
            other.append(name)
            continue
        weights[name] = replace(weight, **_stored(tensor))
    reasons = {
        f"{file.path.name} has no tensors of their names": missing,
        f"{file.path.name} was changed since, or ComfyUI computes them again": other,
    }
    return [_as_held(weights, some, reason) for reason, some in reasons.items() if some]


def _in_the_model(tensors: dict[str, torch.Tensor], patcher) -> dict[str, torch.Tensor]:
    """Returns a file's tensors by the names in the model, where the host's loader renames them."""
    config = patcher.model.model_config
    if "num_res_blocks" in config.unet_config:
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return try_detect(config.process_unet_state_dict, dict(tensors)) or tensors


def _is_rounded_to(tensor: torch.Tensor | JoinedRows, weight: Weight) -> bool:
    """Returns whether a plain weight of a model may be a file's tensor, by its first rows."""
    rows = weight.slices(COMPARED)[0][1]
    start = 0
    if isinstance(tensor, JoinedRows):
        tensor, start, stop = tensor.parts[0]
        rows = min(rows, stop - start)
    held, dtype = weight.read(0, rows).cpu(), weight.plain_dtype
    if dtype is None:
        return False
    if isinstance(tensor, QuantizedTensor):
        # dequantised in another dtype, perhaps, before it was rounded to the model's
        values, limit = _read_rows(tensor, start, start + rows), torch.finfo(dtype).eps
        return bool(((values - held).abs() <= limit * (values.abs() + 1)).all())
    rounded = (tensor[start:start + rows] if tensor.ndim else tensor).to(dtype).float()
    return torch.equal(rounded.nan_to_num(), held.nan_to_num())


def _notes_on_merges(weights: Mapping[str, Weight]) -> list[str]:
    """Returns a note on weights of other models that were rounded to 8 bits before the merge."""
    merged = [
        name for name, weight in weights.items()
        if any(isinstance(value, list) and not isinstance(value[0][0], QuantizedTensor)
               and value[0][0].dtype.itemsize == 1 for _, value, *_ in weight.patches)
    ]
    if not merged:
        return []
    return [f"{len(merged)} weights are merged with another model's as ComfyUI has them, in 8"
            f" bits: {join_some(merged)}. Start ComfyUI without a flag for fp8 to merge its file's"
            " values."]


def source_of_encoders(clip) -> dict[str, Source]:
    """Returns the sources of the encoders in a CLIP by their host's names ("clip_l", "t5xxl").

    They are divided as the host's CLIPSave does. A source holds what the host builds the tokenizer
    from where the host brings none.
    """
    weights = _weights_of(clip.patcher, "")
    parts: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        part, _, rest = name.partition(".transformer.")
        if not rest:  # a setting of the host next to an encoder
            part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = weight
    sources = {}
    parts = {
        part: part_weights for part, part_weights in parts.items()
        if any(len(weight.shape) > 1 for weight in part_weights.values())
    }
    for part, part_weights in parts.items():
        tokenizer = clip.tokenizer if len(parts) == 1 else getattr(clip.tokenizer, part, None)
        part_weights = _rename_for_file(part, part_weights)
        for name, tensor in tokenizer_tensors(tokenizer).items():
            part_weights[name] = extra_tensor(name, tensor)
        sources[part] = _source(part_weights, clip.patcher)
    return sources


def source_of_patcher(patcher) -> Source:
    """Returns the source of all weights of a host's ModelPatcher by their names in its model."""
    return _source(_weights_of(patcher, ""), patcher)


def _source(weights: dict[str, Weight], patcher) -> Source:
    guard = FileChangeGuard.of(weight.tensor for weight in weights.values())
    paths = {path for path, _ in guard.files}.union(*map(_files_at, _paths_loaded_of(patcher)))
    return Source(weights, patcher.load_device, guard=guard, paths=paths)


def _paths_loaded_of(patcher) -> list[str]:
    """Returns the existing paths among the arguments by which the host loads a model again."""
    load, arguments, *_ = patcher.cached_patcher_init or (None, ())
    if isinstance(load, Recipe):
        arguments = [*load.paths, *load.options.values()]
    values = []
    for argument in arguments:
        values += argument if isinstance(argument, (list, tuple)) else [argument]
    return [value for value in values if isinstance(value, str) and os.path.exists(value)]


def _files_at(path: str) -> Collection[Path]:
    """Returns the files of the model at a path, all parts of a split one."""
    try:
        return open_weights(path).paths
    except WeightFileError:
        return (Path(path),)


def _weights_of(patcher, prefix: str) -> dict[str, Weight]:
    weights = {}
    for key in patched_values.weight_names(patcher, prefix):
        name = key.removeprefix(prefix)
        weights[name] = Weight(name, key, tuple(patched_values.patched_shape(patcher, key)),
                               _unpatched_tensor(patcher, key),
                               patched_values.row_reader(patcher, key),
                               tuple(patched_values.effective_patches(patcher, key)))
    return weights


def _unpatched_tensor(patcher, key: str) -> torch.Tensor:
    """Returns a weight without its patches, packed where the host's own layer holds its bytes."""
    tensor = patched_values.unpatched_weight(patcher, key)
    if not isinstance(tensor, QuantizedTensor) or is_packed(tensor):
        return tensor
    layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
    if getattr(layer, "pre_quant_scale", None) is not None:
        return tensor
    packed = packed_of_host(tensor)
    return tensor if packed is None else packed


def extra_tensor(name: str, tensor: torch.Tensor) -> Weight:
    """Returns a tensor that is in the file next to the model's weights."""
    return Weight(name, name, tuple(tensor.shape), tensor, lambda start, stop: tensor)


def _rename_for_file(part: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Renames the weights of an encoder so that the host recognises its file."""
    names = next((names for start, names in NAMES_IN_FILES.items() if part.startswith(start)), {})
    renamed = {}
    for name, weight in weights.items():
        start, dot, rest = name.partition(".")
        weight.name = f"{names.get(start, start)}{dot}{rest}"
        renamed[weight.name] = weight
    return renamed


def tokenizer_tensors(tokenizer) -> dict[str, torch.Tensor]:
    """Returns name -> bytes (uint8) of what the host builds a tokenizer from, as its CLIPSave does.
    """
    state = {} if tokenizer is None else tokenizer.state_dict()
    return {name: _to_bytes(value) for name, value in state.items() if value is not None}


def _to_bytes(value: torch.Tensor | bytes | str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.cpu().to(torch.uint8)
    data = value.encode() if isinstance(value, str) else value
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _markers(patcher) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of MARKERS for a model, as the host's CheckpointSave writes them."""
    model_type = getattr(getattr(patcher.model, "model_type", None), "name", "")
    model_sampling = None
    if hasattr(patcher.model, "model_sampling"):
        model_sampling = patcher.get_model_object("model_sampling")
    markers = {}
    if model_type == "V_PREDICTION":
        markers["v_pred"] = torch.empty(0, dtype=torch.float32)
        if getattr(model_sampling, "zsnr", False):
            markers["ztsnr"] = torch.empty(0, dtype=torch.float32)
    elif model_type == "V_PREDICTION_EDM":
        for name in ("sigma_max", "sigma_min"):
            value = float(getattr(model_sampling, name))
            markers[f"edm_vpred.{name}"] = torch.tensor(value, dtype=torch.float32)
    elif model_type == "EDM" and hasattr(patcher.model.latent_format, "latents_mean"):
        for name in ("mean", "std"):
            value = getattr(patcher.model.latent_format, f"latents_{name}")
            markers[f"edm_{name}"] = value.float().cpu()
    return markers


def source_of_file(path: str | os.PathLike, loras: Sequence[tuple[str, float]] = ()) -> Source:
    """Returns the source of the diffusion model in a file or folder.

    Args:
        path: of a model, or of a checkpoint, whose other parts are left out; or of a ControlNet,
            model patch or CLIP vision model, whose names stay as they are.
        loras: (path, strength), in order.

    Raises:
        WeightFileError: for a file that cannot be read or is not a diffusion model.
        SaveError: for a LoRA that does not fit.
    """
    file = open_weights(path)
    reject_non_diffusion(file)
    guard = file.guard + FileChangeGuard.over(map_file(lora) for lora, _ in loras)
    state_dict = read_marked(file)
    is_side_model = first_match(state_dict, SIDE_MODELS) is not None
    tensors = _in_the_hosts_names(file, state_dict, is_side_model)
    model = try_detect(_empty_model, tensors) if loras else None
    patches, notes = _patches_of(model, loras, os.path.basename(path)) if loras else ({}, [])
    weights = {
        name: weight_of_file(name, tensor, patches.get(name, ()))
        for name, tensor in tensors.items()
        if not name.endswith(INPUT_SCALES)
    }
    missing = patches.keys() - weights.keys()
    if missing:
        raise SaveError(
            f"{os.path.basename(path)} has no {min(missing)}, which a LoRA changes. Get another"
            " conversion of the model.")
    paths = (*file.paths, *(Path(lora) for lora, _ in loras))
    metadata = {
        key: text for key, text in file.text_metadata.items()
        if key == CONFIG or (is_side_model and not key.startswith(NOT_KEPT))
    }
    return Source(weights, notes=[*file.notes, *notes], drop_pages=file.drop_pages, guard=guard,
                  paths=paths, metadata=metadata, is_side_model=is_side_model)


def _in_the_hosts_names(file: WeightFile, state_dict: dict[str, torch.Tensor],
                        is_side_model: bool = False) -> dict:
    """Returns the tensors of a diffusion model by the host's names, or of a side model by its own.

    A weight of several tensors is `JoinedRows`. state_dict: of `read_marked`.
    """
    prefix = "" if is_side_model else model_prefix(state_dict)
    markers = {name: state_dict[name] for name in MARKERS if name in state_dict}
    state_dict = as_tensors(
        file, {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)},
        prefix)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return (tensors if is_side_model else to_comfy_keys(tensors, lazy=True)) | markers


def weight_of_file(name: str, tensor, patches: Sequence[Patch] = ()) -> Weight:
    """Returns a weight of a diffusion model, or of another part of a checkpoint, in a file."""
    return Weight(name, f"{DIFFUSION_MODEL}{name}", tuple(tensor.shape), patches=tuple(patches),
                  **_stored(tensor))


def _stored(tensor: torch.Tensor | JoinedRows) -> dict[str, Any]:
    """Returns what of a `Weight` says how its tensor is stored in a file."""
    if isinstance(tensor, JoinedRows):
        return {"tensor": tensor.parts[0][0], "read": partial(_read_joined_rows, tensor),
                "is_whole": False}
    return {"tensor": tensor, "read": partial(_read_rows, tensor)}


def _read_rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Returns a copy of rows, float32."""
    if is_packed(tensor):
        part = take_rows(relabel(tensor, dtype=torch.float32), slice(start, stop))
        return part.dequantize() if is_packed(part) else part.clone()
    if isinstance(tensor, QuantizedTensor):
        return relabel(tensor, dtype=torch.float32).dequantize()[start:stop].clone()
    return (tensor[start:stop] if tensor.ndim else tensor).to(torch.float32, copy=True)


def _read_joined_rows(rows: JoinedRows, start: int, stop: int) -> torch.Tensor:
    parts, offset = [], 0
    for tensor, first, end in rows.parts:
        low, high = max(start - offset, 0), min(stop - offset, end - first)
        if low < high:
            parts.append(_read_rows(tensor, first + low, first + high))
        offset += end - first
    return torch.cat(parts)


def _empty_model(tensors) -> comfy.model_patcher.ModelPatcher | None:
    """Builds the host's model for these names and shapes on the meta device, None for no model."""
    shapes = {
        name: torch.empty(tensor.shape, dtype=torch.float32, device="meta")
        for name, tensor in tensors.items()
    }
    config = comfy.model_detection.model_config_from_unet(shapes, "")
    if config is None:
        return None
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = (  # pyright: ignore[reportAttributeAccessIssue]
        comfy.ops.disable_weight_init)
    model = config.get_model(shapes, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _patches_of(model, loras: Sequence[tuple[str, float]],
                name: str) -> tuple[dict[str, list[Patch]], list[str]]:
    """Returns the patches of LoRAs, and notes on what of them does not count.

    Args:
        model: of `_empty_model`.
        loras: (path, strength), in order.
        name: of the model's file, for messages.

    Returns:
        Name of a weight -> the host's patches, and the notes.

    Raises:
        SaveError: where the model is unknown, or a LoRA does not fit.
    """
    if model is None:
        raise SaveError(
            f"{name} is not a model that this ComfyUI knows, so the layers of a LoRA cannot be"
            " assigned. Update ComfyUI, or save it without a LoRA.")
    # Imported here, so that saving works on a ComfyUI that lacks what LoRAs need.
    from ..lora.apply import apply_lora
    from ..lora.compatibility import check_lora
    from ..lora.lora_file import load_lora_file

    notes = []
    for path, strength in loras:
        report = check_lora(model, None, *load_lora_file(path), measure=False,
                            use_header_alpha=False)
        if report.fits == "no":
            raise SaveError(f"{os.path.basename(path)} is not applied. {report.verdict}")
        if report.fits != "yes":
            notes.append(f"{os.path.basename(path)}: {report.verdict}")
        if report.alpha_note:
            notes.append(f"{os.path.basename(path)}: {report.alpha_note}")
        model, _ = apply_lora(model, None, report, strength, 0)
    return {
        key.removeprefix(DIFFUSION_MODEL): patches for key, patches in model.patches.items()
    }, notes


def check_saveable(patcher):
    """Raises SaveError for anything that changes weights at run time, which a file cannot hold, and
    WeightFileError for weights that only another pack can read."""
    reject_foreign_weights(patcher.model)
    if patcher.injections:
        raise SaveError(
            f"The model has {join_some(patcher.injections)} put into it while it runs, as a bypass"
            " LoRA is, which a file cannot hold. Load the LoRA with Load LoRA or Apply LoRA"
            " (Featherweight) instead."
        )
    if patcher.hook_patches or patcher.forced_hooks or patcher.hook_backup:
        raise SaveError(
            "The model has LoRA hooks, whose strength follows a schedule; a file holds one"
            " strength. Load the LoRA with Load LoRA or Apply LoRA (Featherweight) instead.")
    if patcher.weight_wrapper_patches:
        raise SaveError(
            f"Functions of another node change the weights"
            f" {join_some(patcher.weight_wrapper_patches)} while the model runs, which a file"
            f" cannot hold. {ADVICE}")
    replaced = [
        name for name, value in patcher.object_patches.items()
        if name.startswith("diffusion_model") and (
            hasattr(value, "forward") or hasattr(value, "shape"))
    ]
    if replaced:
        raise SaveError(
            f"Another node has replaced {join_some(replaced)} by parts of its own, which a file"
            f" cannot hold. {ADVICE}")


def unsaved_parts(patcher) -> list[str]:
    """Returns the names of what is on a model and is not in a file of its weights."""
    options = patcher.model_options
    names = [*patcher.object_patches]
    names += [name for name, value in options.items() if name != "transformer_options" and value]
    for name, value in options.get("transformer_options", {}).items():
        if isinstance(value, dict):
            names += [f"{name}: {part}" for part in value if value[part]]
        elif value and value is not cpu_attention.attention:
            names.append(name)
    names += [
        f"{wrapper_type}: {key}" for wrapper_type, wrappers in patcher.wrappers.items()
        for key, value in wrappers.items() if value
    ]
    return list(dict.fromkeys(map(str, names)))
