"""Loads text encoders from weight files and folders as the host's own CLIP, with packed weights."""
import collections
import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.lt
import comfy.utils
import torch

from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters
from ...ops.log import log
from ..comfyui.contents import encoder_comfy_keys, file_contents
from ..comfyui.detection import UNKNOWN_ERRORS, is_diffusion_model, shape_mismatch_text
from ..comfyui.load_check import check_load
from ..comfyui.packed_patcher import wrap_clip
from ..comfyui.quantized_weights import as_tensors, in_parts, read_marked, reject_unread_layers
from ..comfyui.who_computes import AUTOMATIC, packed_formats
from ..container.weight_file import (
    DOWNLOAD_AGAIN,
    WeightFile,
    WeightFileError,
    first_line,
    model_name,
)
from ..encoders import archs  # noqa: F401  registers the families
from ..encoders.arch import (
    SENTENCEPIECE,
    TOKENIZER_NAMES,
    Arch,
    Weights,
    arch_of,
    strip_prefix,
    unwrap_language_model,
)
from ..encoders.encoder_sets import (
    TEXT_ALONE,
    TITLES,
    TOKENIZER_OF,
    encoder_family,
    reject_missing_tokenizers,
    reject_wrong_encoders,
)
from ..encoders.missing_towers import omit_missing_towers
from ..encoders.saved_tokenizer import saved_tokenizer
from ..encoders.tokenizer import TokenizerError
from ..encoders.type_choice import AUTOMATIC as AUTOMATIC_TYPE
from ..encoders.type_choice import choose_type
from ..files.open_weights import open_weights
from ..progress import Progress
from ..recipe import Recipe, register_loader
from .fit_device import encoder_targets
from .loader_choice import needs_own_reader
from .pack_on_load import PackStats, may_have_host_formats, pack_weights

TEXT_ENCODER = "text encoder"  # name of the loader in recipes
AUTO = "auto"  # use the mmproj file next to the encoder
SIMILAR = 0.6  # names of an encoder and of its mmproj file
AUDIO_TOWER = "a.blk.0.attn_q.weight"

# cache of `Arch.tokenizer`: state of the files of a GGUF -> its tokenizer
TOKENIZERS: dict[tuple, Weights] = {}
TOKENIZERS_KEPT = 4


def load_text_encoder(paths: list[str], clip_type: str = "stable_diffusion",
                      embedding_directory: list[str] | None = None, mmproj: str | None = AUTO,
                      model_options: Mapping[str, Any] | None = None, disable_dynamic: bool = False,
                      pack_to: str | None = None,
                      host_formats: str = AUTOMATIC, compute: str = "exact") -> comfy.sd.CLIP:
    """Loads one to four files or folders as one CLIP and keeps packed weights packed.

    The files may have different formats. Files without packed weights go to the host's own loader,
    unless they are to be packed.

    Args:
        paths: of the files or folders.
        clip_type: lower-case name of the host's `CLIPType`, or AUTOMATIC_TYPE for the one that
            fits the files.
        embedding_directory: folders of textual inversions.
        mmproj: path of the file with the vision tower; AUTO: the file next to the encoder that
            fits; None: no vision tower.
        model_options: the host's, such as `load_device`.
        disable_dynamic: keep the encoder out of dynamic VRAM.
        pack_to: one of `pack_on_load.TYPES`, FIT, or a `size_target`; plain weights are packed to
            it as they are read. Several files share a size by their bytes.
        host_formats: one of `who_computes.HOST_FORMATS`.
        compute: see `PackedLayer`.

    Raises:
        WeightFileError: if a file cannot be read, or if they are not text encoders of this type.
    """
    if clip_type == AUTOMATIC_TYPE:
        clip_type = _type_of_files(paths)
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    recipe = Recipe(
        TEXT_ENCODER, tuple(map(str, paths)), {
            "clip_type": clip_type, "embedding_directory": embedding_directory, "mmproj": mmproj,
            "model_options": dict(model_options or {}), "disable_dynamic": disable_dynamic,
            "pack_to": pack_to,
            **({"host_formats": host_formats} if host_formats != AUTOMATIC else {}),
            **({"compute": compute} if compute != "exact" else {})
        })
    model_options = dict(model_options or {})
    device = model_options.get("load_device", comfy.model_management.text_encoder_device())
    formats = packed_formats(host_formats, device)
    targets = encoder_targets(pack_to, paths, device)
    by_the_host = not any(needs_own_reader(path, target, formats)
                          for path, target in zip(paths, targets.files))
    if by_the_host and mmproj in (AUTO, None):
        try:
            with omit_missing_towers(paths), check_load(_names(paths)) as check:
                clip = comfy.sd.load_clip(list(paths), embedding_directory, host_type,
                                          model_options, disable_dynamic)
                check.attach(clip)
            targets.attach(clip.patcher)
            if disable_dynamic or targets.text:
                recipe.attach(clip.patcher)
            return clip
        except (RuntimeError, *UNKNOWN_ERRORS) as error:
            if isinstance(error, RuntimeError) and shape_mismatch_text(error) is None:
                raise
            log.debug("ComfyUI does not load %s", paths, exc_info=True)
    if mmproj == AUTO and clip_type in TEXT_ALONE:
        mmproj = None
    packing = ["packing" for target in targets.files if target]
    progress = Progress(*["reading"] * len(paths), "converting", *packing, "building the model")
    notes: list[str] = []
    weights, pack_stats, towers = _read_weights(paths, mmproj, progress, targets.files, formats,
                                                notes, device)
    _check_encoders(paths, weights, clip_type)
    if clip_type == "ltxv":
        # The host looks for the tokenizer in the first file.
        weights.sort(key=lambda part: SENTENCEPIECE not in part)
    model_options["custom_operations"] = operations_for(
        collections.ChainMap(*weights), full_precision=True, compute=compute)
    with (
        dequantize_plain_parameters(),
        omit_missing_towers(paths),
        _explain_shapes(paths),
        check_load(_names(paths) + "".join(f" (with {tower})" for tower in towers), notes) as check,
    ):
        clip = comfy.sd.load_text_encoder_state_dicts(
            weights, embedding_directory=embedding_directory, clip_type=host_type,
            model_options=model_options, disable_dynamic=disable_dynamic)
        check.attach(clip)
    progress.stage()
    wrap_clip(clip)
    if pack_stats:
        pack_stats.attach(clip.patcher)
    targets.attach(clip.patcher)
    recipe.attach(clip.patcher)
    return clip


@register_loader(TEXT_ENCODER)
def _patcher(*paths: str, **options) -> comfy.model_patcher.ModelPatcher:
    """Loads the encoder for a recipe."""
    return load_text_encoder(list(paths), **options).patcher


def _type_of_files(paths: list[str]) -> str:
    """Returns the type of the model that these encoders are for, by the names and shapes in the
    files."""
    names = [model_name(path) for path in paths]
    families = [_family_of(name, _unwrap_encoder(_comfy_keys(path)))
                for name, path in zip(names, paths)]
    known = {name.lower() for name in comfy.sd.CLIPType.__members__}
    clip_type = choose_type(names, families, known)
    log.info("%s: type %s", _names(paths), clip_type)
    return clip_type


def _comfy_keys(path: str) -> Weights:
    """Returns the tensors of an encoder's file, without values, under the host's names."""
    if os.path.isdir(path) or path.lower().endswith((".gguf", ".safetensors", ".sft")):
        return encoder_comfy_keys(file_contents(path))[0]
    # a file of torch, which only the host reads
    weights, _ = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    return weights


def _family_of(name: str, tensors: Weights) -> str | None:
    """Returns the key of TITLES for the encoder in a file, None where it holds none.

    Raises WeightFileError if it holds a diffusion model.
    """
    te_model = comfy.sd.detect_te_model(tensors)
    # LTX-2 reads a projection from a file of its own or from its whole checkpoint.
    if (
        te_model is None
        and not comfy.text_encoders.lt.sd_detect([tensors])
        and is_diffusion_model(tensors)
    ):
        raise WeightFileError(
            f"{name} is a diffusion model, expected a text encoder. Pick it in Load Diffusion"
            " Model (GGUF, Featherweight).")
    return te_model and encoder_family(te_model.name, tensors)


def _names(paths: list[str]) -> str:
    return " and ".join(map(model_name, paths))


def _read_weights(paths: list[str], mmproj: str | None, progress: Progress,
                  targets: Sequence[str | None], formats: frozenset[str], notes: list[str],
                  device: torch.device) -> tuple[list[Weights], PackStats | None, list[str]]:
    """Reads the state dict of each file, with the host's names, and packs it to its target.

    The mmproj file goes to the first encoder that it fits. `notes` gets those of the files. The
    last that is returned are the names of the mmproj files that are used.
    """
    encoders = [_Encoder(path, progress, target, formats) for path, target in zip(paths, targets)]
    for encoder in encoders:
        notes += encoder.file.notes if encoder.file else []
    if mmproj == AUTO:
        for encoder in encoders:
            encoder.find_vision()
    elif mmproj is not None:
        vision = open_weights(mmproj)
        if not any(encoder.add_vision(vision, required=len(encoders) == 1)
                   for encoder in encoders):
            raise WeightFileError(
                f"{vision.path.name} fits none of {', '.join(file.name for file in encoders)}:"
                " none is an encoder with such a vision part. Pick another mmproj file, or"
                " none.")
    for encoder in encoders:
        notes += encoder.tower_notes if mmproj == AUTO or encoder.tower else []
    weights = [encoder.convert() for encoder in progress.track(encoders)]
    pack_stats = []
    for index, (encoder, target) in enumerate(zip(encoders, targets)):
        if target and encoder.file:
            pack_stats.append(
                pack_weights(encoder.file, weights[index], target, progress, device=device))
            if may_have_host_formats(target):
                weights[index] = in_parts(weights[index], formats)
    return (weights, PackStats.merge(pack_stats) if pack_stats else None,
            [encoder.tower for encoder in encoders if encoder.tower])


class _Encoder:
    """One file of a text encoder, which is read and converted to the host's names."""

    def __init__(self, path: str, progress: Progress, pack_to: str | None,
                 formats: frozenset[str]):
        self.path = Path(path)
        self.name = model_name(path)
        self.arch: type[Arch] | None = None
        self.file: WeightFile | None = None  # None: the host has read it
        self.tower = ""  # name of its mmproj file
        self.tower_notes: list[str] = []  # on it, or on those of a similar name that do not fit
        if not needs_own_reader(path, pack_to, formats):
            weights, metadata = comfy.utils.load_torch_file(path, safe_load=True,
                                                            return_metadata=True)
            self.weights, self.metadata = comfy.utils.convert_old_quants(
                weights, model_prefix="", metadata=metadata)
            progress.stage()
            return
        self.file = file = open_weights(path)
        weights, self.metadata = read_marked(file, progress.track), file.metadata
        if not pack_to:
            weights = as_tensors(file, weights, formats=formats)
            reject_unread_layers(file, weights)
        self.weights = _unwrap_encoder(weights)
        if self.path.is_dir():
            te_model = comfy.sd.detect_te_model(self.weights)
            tokenizer = TOKENIZER_OF.get(te_model.name if te_model else "", SENTENCEPIECE)
            self.weights |= saved_tokenizer(self.path, tokenizer)
        if pack_to:
            self.weights = as_tensors(file, self.weights)
        self.arch = arch_of(self.weights)
        if self.arch is None and any(name.startswith(("v.blk.", "mm.")) for name in self.weights):
            raise WeightFileError(
                f"{self.name} is the vision part (mmproj) of a text encoder, expected the encoder."
                " Pick that here, and this file in the mmproj input of Load Text Encoder"
                " (GGUF, Featherweight).")

    def add_vision(self, vision: WeightFile, required: bool) -> bool:
        """Adds the tensors of an mmproj file if it fits; returns whether it does.

        Raises:
            WeightFileError: if it has another width and is `required` to fit.
        """
        if self.arch is None:
            return False
        tower = strip_prefix(read_marked(vision))
        try:
            widths = self.arch.vision_width(self.weights, tower)
        except (KeyError, IndexError):  # a tensor is missing or has another shape
            widths = None
        if widths is None and self._similarity(vision.path) > SIMILAR:
            self.tower_notes.append(
                f"{vision.path.name} is not used, and {self.name} cannot take images: it is of"
                f" another encoder, or lacks weights. {DOWNLOAD_AGAIN}")
        if widths and widths[0] == widths[1]:
            self.weights |= tower
            self.tower, self.tower_notes = vision.path.name, []
            if AUDIO_TOWER in tower and not any(name.startswith("mm.a.") for name in tower):
                self.tower_notes.append(
                    f"{self.tower} lacks what turns sound into words ('mm.a.…'), and {self.name}"
                    f" cannot take sound. {DOWNLOAD_AGAIN}")
            log.info("%s takes its vision part from %s", self.name,
                     vision.path.name)
            return True
        if required and widths:
            raise WeightFileError(
                f"{vision.path.name} gives images a width of {widths[1]}, {self.name} has"
                f" {widths[0]}: they are of different models. Pick the mmproj file that was"
                f" published with {self.name}.")
        return False

    def find_vision(self):
        """Adds the mmproj file next to this one that fits and has the most similar name."""
        if (
            self.arch is None
            or not self.arch.wants_vision(self.metadata)
            or self.path.suffix.lower() != ".gguf"
        ):
            return
        siblings = [
            path for path in self.path.parent.glob("*mmproj*") if path.suffix.lower() == ".gguf"
        ]
        siblings.sort(key=self._similarity, reverse=True)
        if not any(self._try_vision(path) for path in siblings):
            log.info(
                "%s has no mmproj file next to it that fits: a workflow that shows"
                " it images will not work. Put it there, or pick it in Load Text Encoder"
                " (GGUF, Featherweight).", self.name)

    def _similarity(self, path: Path) -> float:
        """Returns how similar the names of a file and of this one are, 0 to 1."""
        return difflib.SequenceMatcher(None, path.stem.lower(), self.path.stem.lower()).ratio()

    def _try_vision(self, path: Path) -> bool:
        """Adds the tensors of an mmproj file that the user has not picked, if it is readable and
        fits."""
        try:
            return self.add_vision(open_weights(path), required=False)
        except WeightFileError as error:
            log.warning("%s", error)
            self.tower_notes.append(str(error))
            return False

    def convert(self) -> Weights:
        """Returns the weights with the host's names, and tensors for the host's tokenizer."""
        if self.arch is None:
            # GGUF has no uint8.
            return self.weights | {name: self.weights[name].to(torch.uint8, copy=True)
                                   for name in TOKENIZER_NAMES if name in self.weights}
        try:
            tokenizer = self._tokenizer(self.arch)
        except KeyError as error:
            # `reject_missing_tokenizers` names what is missing in other formats.
            if self.path.suffix.lower() != ".gguf":
                return self._converted(self.arch)
            raise WeightFileError(
                f"{self.name} has no {error.args[0]} in its metadata, from which its tokenizer is"
                " made. Get another conversion of the model.") from error
        except TokenizerError as error:
            raise WeightFileError(
                f"{self.name}: in its metadata {error}. Get another conversion of the model."
            ) from error
        return self._converted(self.arch) | tokenizer

    def _converted(self, arch: type[Arch]) -> Weights:
        try:
            return arch.convert(self.weights, self.metadata)
        except KeyError as error:
            raise WeightFileError(f"{self.name} has no weight for {error.args[0]!r} of the model."
                                  f" {DOWNLOAD_AGAIN}") from error

    def _tokenizer(self, arch: type[Arch]) -> Weights:
        """Returns `Arch.tokenizer` of the file; raises KeyError for missing metadata.

        That of a GGUF, which takes seconds to make, is cached.
        """
        is_cached = self.path.suffix.lower() == ".gguf"
        state = self.path, self.file and self.file.states
        if is_cached and state in TOKENIZERS:
            return TOKENIZERS[state]
        tokenizer = arch.tokenizer(self.weights, self.metadata)
        # A tensor of the file would keep the whole file mapped.
        tokenizer = {name: tensor.clone() for name, tensor in tokenizer.items()}
        if is_cached:
            TOKENIZERS[state] = tokenizer
            if len(TOKENIZERS) > TOKENIZERS_KEPT:
                del TOKENIZERS[next(iter(TOKENIZERS))]
        return tokenizer


def _unwrap_encoder(weights: Weights) -> Weights:
    """Returns an encoder's weights without those of a model around it and without its prefix."""
    weights = strip_prefix(weights)
    return unwrap_language_model(weights) if comfy.sd.detect_te_model(weights) is None else weights


def _check_encoders(paths: list[str], weights: list[Weights], clip_type: str):
    """Raises WeightFileError for files that are not text encoders or do not match the type."""
    names = [model_name(path) for path in paths]
    families = [_family_of(name, part) for name, part in zip(names, weights)]
    if not any(families):
        raise WeightFileError(
            f"{' and '.join(names)} hold{'' if names[1:] else 's'} no text encoder that this"
            f" ComfyUI knows ({len(weights[0])} tensors, first"
            f" {next(iter(weights[0]), 'none')!r}). Update ComfyUI if the model is new, or pick"
            " another file.")
    warning = reject_wrong_encoders(names, families, clip_type)
    if warning:
        log.warning("%s", warning)
    reject_missing_tokenizers(names, families, weights)
    for name, family, part in zip(names, families, weights):
        log.info("%s: %s, %s bytes in memory", name,
                 TITLES.get(family or "", family), sum(tensor.nbytes for tensor in part.values()))


@contextlib.contextmanager
def _explain_shapes(paths: list[str]):
    """Raises WeightFileError if the host takes the weights for a model of another size."""
    try:
        yield
    except (LookupError, NameError) as error:  # names that the host counts on
        raise WeightFileError(
            f"{_names(paths)}: ComfyUI cannot build a text encoder of the weights"
            f" ({first_line(error)}). {DOWNLOAD_AGAIN}") from error
    except RuntimeError as error:
        mismatch = shape_mismatch_text(error)
        if mismatch is None:
            raise
        raise WeightFileError(
            f"{_names(paths)}: {mismatch} Choose the type of model that it is for at `type`, or get"
            " the size that the workflow is for.") from error
