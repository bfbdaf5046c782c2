"""Checks that a model's weights come from its file and that what the file has is used, while the
host builds the model.

The host logs both and goes on: with zeros, random values, or whatever was in a weight's memory.
"""
import contextlib
import re
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...ops.layers.load_hooks import FillEmpty, on_each_registration
from ...ops.layers.packed_layers import PackedLayer
from ...ops.log import log
from ...ops.tensor.packed_layout import is_packed
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFileError, safe_repr
from ..encoders.arch import TOKENIZER_NAMES
from ..name_lists import join_some
from ..quantizers.judgement import judge
from ..refusals.read_anyway import READ_ANYWAY, reads_anyway
from .finite_output import FiniteOutput

NOTES_KEY = "featherweight_load_notes"  # of a patcher's attachments
MARKED_VALUES = 8  # of memory that is not initialised, which become NaN

# A model has at most as many values as its file may have codes, and layers as it may name.
CODES_OF_A_BYTE, BYTES_OF_A_LAYER = 8, 24
SPARE_VALUES, SPARE_LAYERS = 16 << 20, 1000  # that no file needs to have

# Names of tensors of a file that need no use, and why.
UNUSED = tuple((re.compile(pattern), reason) for pattern, reason in (
    (r"(^|\.)(input_scale|scale_input|activation_scale)$",
     "of a layer's input, which is not quantized where this pack computes"),
    (f"^({'|'.join(TOKENIZER_NAMES)})$", "the tokenizer is made of it"),
    (r"(^|\.)position_ids$", "the model counts positions itself"),
    (r"(^|\.)lm_head\.weight$", "it predicts the next token, and the states before it are used"),
    (r"^(vision_model\.|visual_projection\.|logit_bias$)", "only the text part of a CLIP is used"),
    (r"^(encoder\.embed_tokens\.weight$|decoder\.block\.)",
     "only the encoder of a T5 is used, whose table is `shared`"),
    (r"^(loss|model_ema)\.|(^|\.)num_batches_tracked$", "of training"),
))
CLIP_L_WIDTH = 768
# of Flux, HunyuanVideo and their ControlNets: takes the pooled text of a CLIP L
POOLED_TEXT = "vector_in.in_layer.weight"


def _is_clip_l(root: torch.nn.Module, match: re.Match, missing: Container[str]) -> bool:
    return len(root.get_parameter(match.string)) == CLIP_L_WIDTH


def _is_any(root: torch.nn.Module, match: re.Match, missing: Container[str]) -> bool:
    return True


def _is_given_to_controlnet(root: torch.nn.Module, match: re.Match,
                            missing: Container[str]) -> bool:
    """Whether the host gives a ControlNet of SD 3.5 this embedder, before it samples."""
    return (type(root).__name__ == "ControlNetEmbedder"
            and bool(getattr(root, "double_y_emb", False)) == match[0].startswith("orig_y"))


def _shares_keys(root: torch.nn.Module, match: re.Match, missing: Container[str]) -> bool:
    config: Any = getattr(getattr(root, "model", None), "config", None)
    shared = getattr(config, "num_kv_shared_layers", 0)
    return bool(shared) and int(match[1]) >= config.num_hidden_layers - shared


def _lacks(part: str, *methods: str) -> Callable[[torch.nn.Module, re.Match, Container[str]], bool]:
    """Returns a test of whether a file has none of the weights whose names begin so, such as those
    of a VAE's encoder, for a model that has these methods."""
    def is_missing(root: torch.nn.Module, match: re.Match, missing: Container[str]) -> bool:
        return (all(hasattr(root, method) for method in methods)
                and all(name in missing for name, _ in root.named_parameters()
                        if re.match(part, name)))
    return is_missing


ENCODERS_OF_VAES, DECODERS_OF_VAES = r"(?:taesd_)?encoder\.", r"(?:(?:taesd_)?decoder|previewer)\."
CONNECTORS = r"(?:video|audio)_embeddings_connector\."
# Why a model works without a whole part, for the node.
NO_ENCODER = "it has only the half of a VAE that decodes, and cannot encode."
NO_DECODER = "it has only the half of a VAE that encodes, and cannot decode."
NO_CONNECTORS = (
    "LTX-2's connectors are missing, which are published in a file of their own. Pick that in Load"
    " Diffusion Model (GGUF, Featherweight), at module, unless it is picked with the text encoder.")
PARTS = (NO_ENCODER, NO_DECODER, NO_CONNECTORS)

# Names of weights that a model works without, of which models, and why.
NOT_NEEDED = tuple((re.compile(pattern), is_such, reason) for pattern, is_such, reason in (
    (r"^(?:clip_l\.transformer\.)?text_projection\.weight$", _is_clip_l,
     "CLIP L is used without its projection"),
    (r"^(?:orig_y_embedder|x_embedder\.proj)\.", _is_given_to_controlnet,
     "the model that it guides gives it"),
    (r"(?:^|\.)logit_scale$", _is_any, "of the training of a CLIP"),
    (r"^vae_(?:scale|shift)$", _is_any, "TAESD's are 1 and 0"),
    (r"^model\.layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm)\.weight$", _shares_keys,
     "the last layers of Gemma 4 take keys and values of earlier ones"),
    (r"^encoder\.(?:mean|std)$", _is_any, "ComfyUI has ImageNet's, for Stable Cascade"),
    (rf"^(?:{ENCODERS_OF_VAES}|quant_conv\.|conv1\.)",
     _lacks(ENCODERS_OF_VAES, "encode", "decode"), NO_ENCODER),
    (rf"^(?:{DECODERS_OF_VAES}|post_quant_conv\.|conv2\.)",
     _lacks(DECODERS_OF_VAES, "encode", "decode"), NO_DECODER),
    (rf"^{CONNECTORS}", _lacks(CONNECTORS), NO_CONNECTORS),
))
# of a layer that normalizes by statistics of its training
STATISTICS = ("running_mean", "running_var")
# Names and a file's name by which a model has another weight too, without which the host takes it
# for a smaller one: that weight, and what to say of it.
DECIDING = tuple((re.compile(name), re.compile(file, re.IGNORECASE), weight, text)
                 for name, file, weight, text in (
    (r"^double_blocks\.0\.img_mlp\.gate_proj\.weight$", "", r"txt_norm.weight",
     "which Ovis-Image has. Images may be wrong: download it again, or get another conversion."),
    (r"^vision_in\.proj\.0\.weight$", "", r"cond_type_embedding.weight",
     "which HunyuanVideo 1.5 has. Images may be wrong: download it again, or get another"
     " conversion."),
    (r"^pos_embed_input\.weight$", "union", "controlnet_mode_embedder.weight",
     "so the type that is chosen for it has no effect. If it is a model with types, download it"
     " again, or get another conversion."),
))
SHORTEST_CUT = 20  # characters of a name that may be the beginning of a longer one


class LoadCheck:
    """What the host found missing and superfluous while it loaded a model.

    Attributes:
        name: of the file, or of several.
        notes: sentences for the node.
    """

    def __init__(self, name: str, notes: Iterable[str] | None = None, nbytes: int | None = None,
                 files: Mapping[str, str] | None = None):
        self.name = name
        self.notes = list(notes or ())
        self._is_judged = notes is not None
        self._nbytes = nbytes
        self._files = files or {}
        self._values = self._layers = 0
        self._loads: list[tuple[torch.nn.Module, list[str], list[str]]] = []
        self._loaded: set[str] = set()
        self._left_over: list[str] = []
        self._parts: tuple[Any, ...] = ()

    def leave_over(self, names: Iterable[str]):
        """Tells of names that the host leaves behind where it converts those of others."""
        self._left_over += names

    def attach(self, *parts: Any):
        """Tells of which parts the first that has a patcher gets the notes."""
        self._parts = parts

    def count(self, module: torch.nn.Module):
        """Counts a module that is built.

        Raises:
            WeightFileError: the model becomes larger than its file can be, as where names alone
                make it so.
        """
        if self._nbytes is None:
            return
        self._values += sum(tensor.numel() for tensor in module._parameters.values()
                            if tensor is not None)
        self._layers += bool(module._parameters)
        if (self._values > SPARE_VALUES + CODES_OF_A_BYTE * self._nbytes
                or self._layers > SPARE_LAYERS + self._nbytes // BYTES_OF_A_LAYER):
            raise WeightFileError(
                f"{self.name} names more layers than its {self._nbytes:,} bytes can hold."
                f" {DOWNLOAD_AGAIN}")

    def before_load(self, module: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str,
                    local_metadata, strict, missing: list[str], unexpected: list[str], errors):
        """Is called as torch calls a hook before a module takes its part of a state dict."""
        if prefix or any(lists is missing for _, lists, _ in self._loads):
            return
        self._loads.append((module, missing, unexpected))
        self._loaded |= state_dict.keys()
        _complete_cut_names(module, state_dict)
        self._judge(module, state_dict)
        if not any(isinstance(hook, FiniteOutput) for hook in module._forward_hooks.values()):
            module.register_forward_hook(FiniteOutput(self.name))

    def _judge(self, module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]):
        weights = (*module.named_parameters(), *module.named_buffers())
        floats = {name for name, weight in weights if weight.is_floating_point()}
        tensors = {name: tensor for name, tensor in state_dict.items()
                   if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta"}
        judgement = judge(tensors, {}, tensors.__getitem__, floats, looks=not self._is_judged)
        judgement.reject(lambda name, problem, advice: WeightFileError(
            f"{self._files.get(name, self.name)}: {problem}. {advice}"))
        self.notes += [f"{self.name}: {sentence}" for sentence in judgement.told]

    def finish(self):
        """Gives what no file has its value, and writes the notes, also to the model's patcher.

        Raises:
            WeightFileError: the model lacks weights.
        """
        made, initialised, computed, parts = self._fill_missing()
        unused = [name for *_, names in self._loads for name in sorted(names) if _is_of_use(name)]
        if made and unused:
            raise WeightFileError(
                f"{self.name} makes only a part of the model: it has no"
                f" {join_some(map(safe_repr, made))}, and the model has no"
                f" {join_some(map(safe_repr, unused))}. {DOWNLOAD_AGAIN}")
        unused += [name for name in self._left_over
                   if name not in self._loaded and _is_of_use(name)]
        if (made or initialised) and not reads_anyway():
            others = (f"; the model does not use {join_some(map(safe_repr, unused))} of it"
                      if unused else "")
            raise WeightFileError(
                f"{self.name} lacks weights of the model:"
                f" {join_some(map(safe_repr, made + initialised))}{others}. {DOWNLOAD_AGAIN}"
                f" {READ_ANYWAY}")
        self._note_missing(made, initialised + computed, parts)
        for file in dict.fromkeys(self._files.get(name, self.name) for name in unused):
            names = [name for name in unused if self._files.get(name, self.name) == file]
            self.notes.append(f"The model does not use {join_some(map(safe_repr, names))} of"
                              f" {file}.")
        self.notes += [
            f"{self.name} has no {weight!r}, {text}" for pattern, file, weight, text in DECIDING
            if weight not in self._loaded and file.search(self.name)
            and any(map(pattern.match, self._loaded))]
        patcher = next(filter(None, map(patcher_of, self._parts)), None)
        if patcher is not None:
            patcher.set_attachments(NOTES_KEY, tuple(self.notes))
        elif self.notes:
            log.warning("%s", " ".join(self.notes))

    def _fill_missing(self) -> tuple[list[str], list[str], list[str], set[str]]:
        """Gives what no file has its value.

        Returns:
            The names of weights that got theirs here, from the host's initialisation, and from its
            computation; and the reasons of PARTS for whole parts that are missing.
        """
        made, initialised, computed, parts = [], [], [], set()
        for module, missing, _ in self._loads:
            absent = set(missing)
            for name in missing:
                reason = _reason_not_needed(module, name, absent)
                if reason in PARTS:
                    parts.add(reason)
                    _make(module, name)
                elif reason is None:
                    names = (computed if _is_computed(module, name)
                             else made if _make(module, name) else initialised)
                    names.append(name)
        return made, initialised, computed, parts

    def _note_missing(self, made: list[str], initialised: list[str], parts: set[str]):
        for module, *_ in self._loads:
            self._note_cut_pooled_text(module)
        if made:
            self.notes.append(
                f"{self.name} lacks weights of the model: {join_some(map(safe_repr, made))}"
                f" {'are' if made[1:] else 'is'} zeros, or ones where it scales. Images may be"
                " wrong: download the file again, or get another conversion.")
        if initialised:
            self.notes.append(f"{self.name} has no {join_some(map(safe_repr, initialised))}:"
                              " ComfyUI's initial values are used.")
        self.notes += [f"{self.name}: {reason}" for reason in sorted(parts)]

    def _note_cut_pooled_text(self, module: torch.nn.Module):
        """Notes a weight with too few columns, for which the host cuts the pooled text off."""
        weight = dict(module.named_parameters()).get(POOLED_TEXT)
        if weight is not None and weight.shape[-1] < CLIP_L_WIDTH:
            self.notes.append(
                f"{POOLED_TEXT!r} of {self.name} takes {weight.shape[-1]} values of the pooled"
                f" text, expected {CLIP_L_WIDTH}: ComfyUI leaves the others out. Images may be"
                " wrong: download the file again, or get another conversion.")


def _is_of_use(name: str) -> bool:
    return not any(pattern.search(name) for pattern, _ in UNUSED)


def bytes_of(weights: Mapping[str, torch.Tensor]) -> int:
    """Returns the bytes of weights, of packed ones as they are."""
    return sum(tensor.nbytes for tensor in weights.values() if isinstance(tensor, torch.Tensor))


def patcher_of(part: Any) -> ModelPatcher | None:
    """Returns the host's patcher of a model, or of what has one, None without one."""
    if isinstance(part, ModelPatcher):
        return part
    return getattr(part, "patcher", None) or getattr(part, "control_model_wrapped", None)


def load_notes(patcher: ModelPatcher) -> tuple[str, ...]:
    """Returns what a patcher's load has to say of its file."""
    return patcher.get_attachment(NOTES_KEY) or ()


@contextlib.contextmanager
def check_load(name: str, notes: Iterable[str] | None = None, nbytes: int | None = None,
               files: Mapping[str, str] | None = None) -> Iterator[LoadCheck]:
    """While the host builds and loads a model, watches what it does not find in the file.

    Args:
        name: of the file, or of several.
        notes: what the reader of the file says; None: the host reads it.
        nbytes: of the weights, where their names say how large the model is; otherwise None.
        files: name of a weight -> that of its file, where it is another.

    Raises:
        WeightFileError: see `LoadCheck.count` and `LoadCheck.finish`.
    """
    check = LoadCheck(name, notes, nbytes, files)
    hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # not by id: of a dead one again
    with contextlib.ExitStack() as handles:

        def hook(parent, _, module):
            for each in (parent, module):
                if each not in hooked:
                    hooked.add(each)
                    handle = each.register_load_state_dict_pre_hook(check.before_load)
                    handles.callback(handle.remove)
                    check.count(each)

        # what initialises memory overwrites its mark
        with on_each_registration(hook), FillEmpty(_mark):
            yield check
    check.finish()


def _mark(tensor: torch.Tensor):
    _first_values(tensor, lambda values: values.fill_(float("nan")))


def _first_values(tensor: torch.Tensor, use: Any) -> Any:
    """Calls a function with the first values of a tensor in memory, None where it has none."""
    if tensor.device.type != "cpu" or not tensor.is_floating_point() or not tensor.numel():
        return None
    count = min(MARKED_VALUES, tensor.untyped_storage().nbytes() // tensor.itemsize
                - tensor.storage_offset())
    return use(tensor.as_strided((count,), (1,))) if count else None


def _make(root: torch.nn.Module, name: str) -> bool:
    """Gives a weight that no file has its value; returns whether the host has not."""
    owner, last = _owner(root, name)
    tensor = owner._parameters.get(last, owner._buffers.get(last))
    if tensor is None or is_packed(tensor):
        return False
    if isinstance(owner, PackedLayer):
        return True  # which makes zeros
    if is_empty := _is_empty(tensor):
        is_scale = tensor.ndim == 1 and last != "bias" and "norm" in type(owner).__name__.lower()
        tensor.detach().fill_(float(is_scale))
    return is_empty


def _owner(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Returns the module of a weight and its name there; an empty module where there is none."""
    owner, _, last = name.rpartition(".")
    try:
        return root.get_submodule(owner), last
    except AttributeError:
        return torch.nn.Module(), last


def _is_empty(tensor: torch.Tensor) -> bool:
    """Returns whether the memory of a tensor is as `_mark` has marked it."""
    return bool(_first_values(tensor.detach(), lambda values: bool(values.float().isnan().all())))


def _is_computed(root: torch.nn.Module, name: str) -> bool:
    """Returns whether the host computes a value that no file has, such as frequencies: a buffer
    that it has filled, and not statistics of a training."""
    owner, last = _owner(root, name)
    buffer = owner._buffers.get(last)
    return buffer is not None and last not in STATISTICS and not _is_empty(buffer)


def _reason_not_needed(root: torch.nn.Module, name: str, missing: Container[str]) -> str | None:
    """Returns why a model works without a weight, by `NOT_NEEDED`; None if it does not."""
    return next((reason for pattern, is_such, reason in NOT_NEEDED
                 if (match := pattern.search(name)) is not None
                 and is_such(root, match, missing)), None)


def _complete_cut_names(module: torch.nn.Module, state_dict: dict[str, torch.Tensor]):
    """Gives names that were cut, as by stable-diffusion.cpp to 63 characters, their ends again.

    A name is completed where one weight of the model begins with it that the file does not have,
    and has its shape.
    """
    shapes = {name: tensor.shape for name, tensor in (
        *module.named_parameters(), *module.named_buffers())}
    for name in [name for name in state_dict if name not in shapes]:
        tensor = state_dict[name]
        fitting = [] if len(name) < SHORTEST_CUT else [
            full for full, shape in shapes.items()
            if full.startswith(name) and full not in state_dict and shape == tensor.shape]
        if len(fitting) == 1:
            state_dict[fitting[0]] = state_dict.pop(name)
