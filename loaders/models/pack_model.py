"""Packs the model of any MODEL: makes a copy with packed matrices, next to the model itself.

The copy has all else that the model has, whatever loaders and other nodes have set on it, and the
MODEL's own patches, hooks, wrappers and options. The model stays as it is.
"""
import copy
import hashlib
import re
import types
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch

from ...ops.layers.comfyui_operations import hold_packed, takes_packed
from ...ops.patcher.patched_weights import Patch
from ...ops.tensor.packed_layout import (
    QuantizedTensor,
    is_packed,
    pack_16bit,
    plain_dtype_of,
    safe_detach,
)
from ...ops.tensor.packed_tensor import relabel
from ..comfyui.compute import EXACT, FLOAT32
from ..comfyui.diffusers_keys import JoinedRows
from ..comfyui.keep_packed import choose_kitchen_products, keep_packed
from ..comfyui.load_check import NOTES_KEY, load_notes
from ..comfyui.model_summary import PACK_STATS_KEY
from ..comfyui.source_use import use_of_source
from ..container.weight_file import WeightFileError, first_line, safe_repr
from ..name_lists import join_some
from ..out_of_memory import is_out_of_memory
from ..packing.source import Weight, source_of_model
from ..progress import Progress
from ..quantizers.comfy_quant_formats import FP8
from ..quantizers.judgement import judge
from ..recipe import Recipe, model_paths, source_name
from ..refusals.foreign_weights import COMPILED, reject_foreign_weights
from .fit_device import FIT, FIT_KEY, Targets, loaded_targets
from .pack_on_load import PackStats, PackTo, pack_weights

ADVICE = ("Put Pack Model (Featherweight) before the node that adds it, or choose `pack to` in a"
          " loader of this pack.")
PIECE_BYTES = 4096  # of each weight, by which a change is seen
COPY = "featherweight_copy"  # attribute of the host's model: its `_Copy`
# What the host and this pack keep on a model, and on its layers, while it is on a device.
STATE = ("dynamic_patchers", "dynamic_pins", "dynamic_vbars", "packed_patches", "packed_residency",
         "model_loaded_weight_memory", "lowvram_patch_counter", "model_lowvram",
         "current_weight_patches_uuid", "model_offload_buffer_memory", COPY)
LAYER_STATE = re.compile(r"_v|_pin|(weight|bias)_lowvram_function")


@dataclass
class _Copy:
    """The packed copy of a model.

    Attributes:
        target: what was packed to.
        device: of the model.
        source: `_fingerprint` of the model.
        rounded: what was rounded in: of each patch the weight and its numbers, and a reference to
            what it adds.
        patcher: of the copy, without patches.
        stats: of the packing.
    """

    target: PackTo
    device: torch.device
    source: str
    rounded: Sequence[tuple[tuple, Callable[[], Any]]]
    patcher: Any
    stats: PackStats

    def is_of(self, target: PackTo, device: torch.device, source: str, rounded: Sequence) -> bool:
        """Returns whether it is what packing would give."""
        return (self.target, self.device, self.source, len(self.rounded)) == (
            target, device, source, len(rounded)) and (
            all(numbers == own and added() is not None and added() is own_added()
                for (numbers, added), (own, own_added) in zip(rounded, self.rounded)))


class _PatchedRows(JoinedRows):
    """A weight that is read, and patched, when it is packed."""

    def __init__(self, weight: Weight):
        super().__init__([(weight.tensor, 0, weight.rows)])
        self.weight = weight
        self.shape = torch.Size(weight.shape)

    def joined(self) -> torch.Tensor:
        return self.weight.patched(0, self.weight.rows)


class _Model:
    """A model as `pack_weights` sees the file of one, and its weights.

    Attributes:
        weights: name -> weight.
        held: of those that the model still holds, the layer and the name there.
        takers: names of those whose layer can hold a packed one.
        fixed: names of the matrices whose layer cannot.
        kept: those of them that the model holds, as large as they stay.
    """

    def __init__(self, patcher):
        self.name = source_name(patcher)
        self.path = next(iter(model_paths(patcher)), "")
        source = source_of_model(patcher)
        self.drop_pages, self.shapes = source.drop_pages, source.shapes
        self.weights = {name: weight for name, weight in source.weights.items() if weight.is_number}
        self.held = {name: _layer_and_name(patcher.model, weight.key)
                     for name, weight in self.weights.items()
                     if hasattr(patcher.model, weight.key.partition(".")[0])}
        self.takers = {name for name, (layer, parameter_name) in self.held.items()
                       if parameter_name == "weight" and takes_packed(layer)}
        self.fixed = {name for name, weight in self.weights.items()
                      if name not in self.takers and len(weight.shape) > 1}
        self.kept = {name: getattr(*self.held[name]).detach()
                     for name in self.fixed & self.held.keys()}

    def error_at(self, name: str, problem: str, advice: str) -> WeightFileError:
        return WeightFileError(f"{self.name}: {problem}. {advice}")


def pack_model(patcher: comfy.model_patcher.ModelPatcher, pack_to: PackTo,
               round_loras: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Packs the model of a MODEL.

    The weights of other models that were merged into it are rounded in, and LoRAs before them.

    Args:
        patcher: of a diffusion model, packed or not; it stays as it is, and leaves its device.
        pack_to: see `PackTo`, or FIT. Weights that are packed already stay so, as in a loader.
        round_loras: whether LoRAs are rounded into the packed weights too; else they stay patches.

    Returns:
        A patcher of the packed copy. The same model is not packed twice to the same.

    Raises:
        WeightFileError: for a model that cannot be packed.
    """
    model: Any = patcher.model
    _unload(model)  # a part that is patched in would count as the model's
    notes = _reject_unpackable(patcher)
    targets, file = Targets((pack_to,)), None
    if pack_to == FIT:
        file = _Model(patcher)
        stored = {name: weight.tensor for name, weight in file.weights.items()} | file.kept
        targets = loaded_targets(file, stored, file.shapes, patcher.load_device,
                                 model.model_config, file.fixed)
    target = targets.files[0]
    if target is None:
        vars(model).pop(COPY, None)
        packed = patcher.clone()
        targets.attach(packed)
        return packed
    rounded = {key: count for key, patches in patcher.patches.items()
               if (count := _rounded_patches(patches, round_loras))}
    patches = [identity for key, count in rounded.items()
               for patch in patcher.patches[key][:count] for identity in _identities(key, patch)]
    made, now = getattr(model, COPY, None), (target, patcher.load_device, _fingerprint(patcher))
    if made is None or not made.is_of(*now, patches):
        vars(model).pop(COPY, None)  # before the next one is made
        made = _Copy(*now, patches,
                     *_packed_copy(patcher, file or _Model(patcher), target, rounded))
        setattr(model, COPY, made)
    packed = _clone_for(made.patcher, patcher)
    if rounded:
        packed.patches = {key: rest for key, patches in packed.patches.items()
                          if (rest := patches[rounded.get(key, 0):])}
        packed.patches_uuid = uuid.uuid5(patcher.patches_uuid, str(sorted(rounded.items())))
    made.stats.attach(packed)
    packed.set_attachments(NOTES_KEY, (*load_notes(patcher), *load_notes(made.patcher), *notes))
    targets.attach(packed)
    return packed


def _rounded_patches(patches: Sequence[Patch], all_of_them: bool) -> int:
    """Returns how many of a weight's patches are rounded in: up to the last one that is another
    model's weight, which would be in memory as well."""
    if all_of_them:
        return len(patches)
    return max((index + 1 for index, (_, value, *_) in enumerate(patches)
                if isinstance(value, list)), default=0)


def _identities(key: str, patch: Patch) -> list[tuple[tuple, Callable[[], Any]]]:
    """Returns what tells a patch of a weight from others, and a reference to what it adds, which
    does not keep that alive; so of the patches of another model's weight too."""
    strength, value, *numbers = patch
    inner = value[1:] if isinstance(value, list) else ()
    while isinstance(value, (list, tuple)):  # of tensors, next to names and numbers
        value = next((each for each in value if isinstance(each, (list, tuple, torch.Tensor))), key)
    own = (key, strength, *numbers), (lambda: key) if value is key else weakref.ref(value)
    return [own, *(each for other in inner for each in _identities(key, other))]


def _unload(model: torch.nn.Module):
    """Takes a model, with whatever patches are in its weights, off its devices."""
    loaded = comfy.model_management.current_loaded_models
    others = [each for each in loaded if each.model is None or each.model.model is not model]
    for device in {each.device for each in loaded if each not in others}:
        comfy.model_management.free_memory(1e30, device, others)


def _reject_unpackable(patcher) -> list[str]:
    """Raises WeightFileError for a model of which a copy would not compute the same. Returns
    sentences on what may not have its effect on one."""
    reject_foreign_weights(patcher.model)
    if patcher.injections:
        raise WeightFileError(
            f"The model has {join_some(patcher.injections)} put into it while it runs, as a bypass"
            f" LoRA is, which a packed copy would not have. {ADVICE}")
    use, notes = use_of_source(patcher), []
    wrapped = use["block"] + [name for name in (COMPILED,) if patcher.model_options.get(name)]
    if wrapped:
        raise WeightFileError(
            f"Another node has wrapped {join_some(wrapped)} of the model, as torch.compile does,"
            f" which a packed copy would not have. {ADVICE}")
    if use["whole"]:
        notes.append(
            f"{join_some(use['whole'])} of another node holds the model that is packed: what it"
            " changes there, the packed copy does not have. If it does nothing, put Pack Model"
            " (Featherweight) before that node.")
    if use["unknown"]:
        notes.append(
            f"{join_some(use['unknown'])} of another node holds too much to be looked through: if"
            " it computes with parts of the model, these are not packed. Then put Pack Model"
            " (Featherweight) before that node.")
    return notes


def _fingerprint(patcher) -> str:
    """Returns what tells whether a model has been changed since: of each weight the bytes in its
    middle and, where the host does not move it, its address."""
    digest = hashlib.sha256(str(patcher.model.current_weight_patches_uuid).encode())
    is_moved = not patcher.is_dynamic() and patcher.load_device != patcher.offload_device
    for tensor in (*patcher.model.parameters(), *patcher.model.buffers()):
        tensor = getattr(tensor, "_qdata", tensor).detach()
        storage, count = tensor.untyped_storage(), min(PIECE_BYTES, tensor.nbytes)
        first = tensor.storage_offset() * tensor.itemsize + (tensor.nbytes - count) // 2
        piece = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        piece.set_(storage, min(first, storage.nbytes() - count), (count,), (1,))
        digest.update(piece.cpu().numpy().tobytes())
        digest.update(b"" if is_moved else str(tensor.data_ptr()).encode())
    return digest.hexdigest()


def _packed_copy(patcher, file: _Model, pack_to: PackTo, rounded: Mapping[str, int]
                 ) -> tuple[Any, PackStats]:
    """Returns a patcher of the packed copy, without patches, and what was packed.

    rounded: key of a weight -> how many of its patches are rounded in.
    """
    model, held, takers = patcher.model, file.held, file.takers
    stored = {name: weight.tensor for name, weight in file.weights.items()}
    judgement = judge(stored, {}, stored.__getitem__, stored)
    judgement.reject(file.error_at)
    weights = {name: replace(weight, patches=_first_patches(weight, patcher, rounded))
               for name, weight in file.weights.items()}
    packed: dict[str, Any] = {name: _as_stored(weight) for name, weight in weights.items()}
    packed |= {name: value for name, value in file.kept.items() if not weights[name].patches}
    stats = pack_weights(file, packed, pack_to, Progress("packing"),
                         device=patcher.load_device, fixed=file.fixed)
    replaced = {}
    for key, (layer, parameter_name) in held.items():
        if key not in takers and not weights[key].patches:
            continue
        parameter, value = getattr(layer, parameter_name), packed.pop(key)
        value = value.joined() if isinstance(value, JoinedRows) else value
        dtype = _dense_dtype(parameter, model)
        if key not in takers:
            value = value.to(parameter.dtype)
        elif is_packed(value):
            value = relabel(value, dtype=dtype)
        else:
            value = pack_16bit(value, dtype)
        replaced[id(parameter)] = value
    is_quantized = any(is_packed(value) and plain_dtype_of(value) is None
                       for value in replaced.values())
    if not takers or not (is_quantized or isinstance(pack_to, int)):
        raise WeightFileError(
            f"{file.name}: none of its weights can be packed: they are small, or in layers that are"
            " not ComfyUI's. Use the model as it is.")
    try:
        copied = _copy_model(model, replaced)
    except (TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise WeightFileError(
            f"{file.name}: another node has put something into the model that cannot be copied"
            f" ({first_line(error)}). {ADVICE}") from error
    for layer in copied.modules():
        if is_packed(layer._parameters.get("weight")):
            hold_packed(layer)
    make = _CopyAgain(copied, patcher.load_device, patcher.offload_device, patcher.is_dynamic())
    made = make.patcher_of(copied)
    made.cached_patcher_init = make, (file.path,)
    told = () if load_notes(patcher) else judgement.told  # of which its loader has told
    notes = [*told, *_coarse_weights(file)]
    made.set_attachments(NOTES_KEY, tuple(f"{file.name}: {note}" for note in notes))
    load, *_ = getattr(patcher, "cached_patcher_init", None) or (None,)
    if not isinstance(load, Recipe) or load.options.get("compute") not in (EXACT, FLOAT32):
        choose_kitchen_products(made)
    return made, stats


def _coarse_weights(file: _Model) -> list[str]:
    """Returns a sentence, if the copy keeps weights that their loader has rounded to 8 bits."""
    kept = [name for name, (layer, parameter_name) in file.held.items()
            if name not in file.takers and getattr(layer, parameter_name).dtype in FP8
            and file.weights[name].tensor.dtype not in FP8]
    if not kept:
        return []
    return [f"{join_some(map(safe_repr, kept))} stay in 8 bits, to which their loader has rounded"
            " them; what is packed is the file's. Choose the weight_dtype default in that loader."]


def _first_patches(weight: Weight, patcher, counts: Mapping[str, int]) -> Sequence[Patch]:
    first = patcher.patches.get(weight.key, ())[:counts.get(weight.key, 0)]
    return [patch for patch in weight.patches if any(patch is each for each in first)]


def _layer_and_name(model: torch.nn.Module, key: str) -> tuple[Any, str]:
    """Returns the layer that holds a weight, and its name there."""
    layer_name, _, name = key.rpartition(".")
    return model.get_submodule(layer_name), name


def _as_stored(weight: Weight) -> torch.Tensor | JoinedRows:
    is_read_whole = weight.is_whole and not weight.patches and (
        is_packed(weight.tensor) or not isinstance(weight.tensor, QuantizedTensor))
    return weight.tensor if is_read_whole else _PatchedRows(weight)


def _dense_dtype(parameter: torch.Tensor, model: Any) -> torch.dtype:
    """Returns what a packed weight passes for: its dtype in the model, but none of 8 bits."""
    return parameter.dtype if parameter.dtype.itemsize > 1 else model.get_dtype_inference()


def _copy_model(model: Any, replaced: Mapping[int, torch.Tensor]) -> Any:
    """Returns a copy of a model that is on no device, for a patcher of its own.

    Packed weights are shared with it, since nothing writes into them.

    Args:
        model: the host's.
        replaced: `id` of a parameter or buffer -> the tensor that the copy has in its place.
    """
    memo = {id(model.model_config): model.model_config,  # which cannot be copied
            id(model.current_patcher): None}
    for tensor in (*model.parameters(), *model.buffers()):
        value = replaced.get(id(tensor))
        if value is None:
            value = safe_detach(tensor) if isinstance(tensor, QuantizedTensor) else (
                tensor.detach().clone())
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
    state = [(each, name) for each in model.modules() for name in vars(each)
             if (name in STATE if each is model else LAYER_STATE.match(name))]
    memo |= {id(value): None for each, name in state
             if not isinstance(value := vars(each)[name], (int, str, type(None)))}
    copied = copy.deepcopy(model, memo)
    copies = dict(zip(model.modules(), copied.modules(), strict=True))
    for each, name in state:
        vars(copies[each]).pop(name, None)
    return copied


@dataclass(frozen=True)
class _CopyAgain:
    """Makes another patcher of a packed model, as the host asks for: for another GPU, or outside
    dynamic VRAM. Only the plain weights are in memory twice.

    Attributes:
        model: the packed one.
        load_device: where it computes.
        offload_device: where it is otherwise.
        is_dynamic: whether it may be in dynamic VRAM.
    """

    model: Any
    load_device: torch.device
    offload_device: torch.device
    is_dynamic: bool

    def __call__(self, path: str = "", disable_dynamic: bool = False):
        """path: of the file that the model was loaded from first, by which it is named."""
        _unload(self.model)
        patcher = self.patcher_of(_copy_model(self.model, {}), disable_dynamic)
        patcher.cached_patcher_init = self, (path,)
        return patcher

    def patcher_of(self, model, disable_dynamic: bool = False):
        """Returns a patcher for a model that has none."""
        is_dynamic = self.is_dynamic and not disable_dynamic
        patcher_class = (comfy.model_patcher.CoreModelPatcher if is_dynamic
                         else comfy.model_patcher.ModelPatcher)
        patcher = patcher_class(model, self.load_device, self.offload_device)
        keep_packed(patcher)
        return patcher


def _clone_for(made, patcher):
    """Returns a patcher of the packed copy with all else that another patcher has.

    Args:
        made: the copy's, without patches.
        patcher: the MODEL's that was packed.
    """
    packed = patcher.clone(model_override=made.get_clone_model_override())
    packed.__class__ = type(made)
    packed.size, packed.parent, packed.clone_base_uuid = 0, made, made.clone_base_uuid
    packed.cached_patcher_init = made.cached_patcher_init
    packed.hook_backup, packed.cached_hook_patches = {}, {}
    if hasattr(packed, "remove_additional_models"):
        packed.remove_additional_models("multigpu")
    names = {id(module): name for name, module in patcher.model.named_modules()}
    bound = {name: value for name, value in patcher.object_patches.items()
             if isinstance(value, types.MethodType) and id(value.__self__) in names}
    if bound:
        _unload(packed.model)  # whose parts other nodes may have replaced meanwhile
    for name, value in bound.items():
        owner = packed.model.get_submodule(names[id(value.__self__)])
        packed.object_patches[name] = types.MethodType(value.__func__, owner)
    for key in (FIT_KEY, PACK_STATS_KEY):
        packed.attachments.pop(key, None)
    return packed
