"""Text encoders: weight files and folders -> the host's own CLIP, with packed weights."""
import contextlib
import difflib
import itertools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.lt
import comfy.utils
import torch

from ..ops.load_hooks import dequantize_plain_parameters
from ..ops.operations import operations_for
from .comfy_bridge import wrap_clip
from .comfy_quant import as_tensors, reject_unread_layers
from .detection import is_diffusion_model, shape_mismatch_text
from .encoders import archs  # noqa: F401  registers the families
from .encoders.arch import (
    SENTENCEPIECE,
    TOKENIZER_NAMES,
    Weights,
    arch_of,
    strip_prefix,
    unwrap_language_model,
)
from .encoders.encoder_sets import (
    TEXT_ALONE,
    TITLES,
    TOKENIZER_OF,
    encoder_family,
    reject_missing_tokenizers,
    reject_wrong_encoders,
)
from .encoders.missing_towers import omit_missing_towers
from .encoders.saved_tokenizer import saved_tokenizer
from .encoders.tokenizer import TokenizerError
from .files import open_weights
from .files.container import FileState, WeightFile, WeightFileError
from .pack_on_load import Packed, pack_weights
from .progress import Progress
from .reader_choice import needs_own_reader
from .recipe import Recipe, register_loader

log = logging.getLogger(__name__)

TEXT_ENCODER = "text encoder"
AUTO = "auto"  # an mmproj file is looked for beside its encoder

# What `Arch.tokenizer` made of the files loaded last, by these in their state.
TOKENIZERS: dict[tuple, Weights] = {}
TOKENIZERS_KEPT = 4


def load_text_encoder(paths: list[str], clip_type: str = "stable_diffusion",
                      embedding_directory: list[str] | None = None, mmproj: str | None = AUTO,
                      model_options: Mapping[str, Any] | None = None, disable_dynamic: bool = False,
                      pack_to: str | None = None) -> comfy.sd.CLIP:
    """Load one to four files or folders as one CLIP, with packed weights kept packed. Any mix of
    kinds of files.

    clip_type: lower-case name of the host's `CLIPType`. mmproj: file with the vision tower of an
    encoder that sees; AUTO: the one beside it that fits; None: none. model_options: the host's,
    such as `load_device`. disable_dynamic: keep the encoder out of dynamic VRAM. pack_to: one of
    `pack_on_load.TYPES`, to which the weights that are not packed yet are packed as they are read.
    Files without packed weights go to the host's own loader where none is to be packed. Raises
    WeightFileError.
    """
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    recipe = Recipe(
        TEXT_ENCODER, tuple(map(str, paths)), {
            "clip_type": clip_type, "embedding_directory": embedding_directory, "mmproj": mmproj,
            "model_options": dict(model_options
                                  or {}), "disable_dynamic": disable_dynamic, "pack_to": pack_to
        })
    model_options = dict(model_options or {})
    if not any(needs_own_reader(path, pack_to) for path in paths) and mmproj in (AUTO, None):
        clip = comfy.sd.load_clip(list(paths), embedding_directory, host_type, model_options,
                                  disable_dynamic)
        if disable_dynamic:
            recipe.attach(clip.patcher)
        return clip
    if mmproj == AUTO and clip_type in TEXT_ALONE:
        mmproj = None
    # Each is read, all are put in order, each is packed, the host builds.
    progress = Progress(stages=len(paths) * (2 if pack_to else 1) + 2)
    weights, packed = _weights_of(paths, mmproj, progress, pack_to)
    _check(paths, weights, clip_type)
    if clip_type == "ltxv":
        # the host looks for the tokenizer in the first file
        weights.sort(key=lambda part: SENTENCEPIECE not in part)
    model_options["custom_operations"] = operations_for(
        itertools.chain(*weights), full_precision=True)
    with dequantize_plain_parameters(), omit_missing_towers(paths), _explain_other_sizes(paths):
        clip = comfy.sd.load_text_encoder_state_dicts(weights,
                                                      embedding_directory=embedding_directory,
                                                      clip_type=host_type,
                                                      model_options=model_options,
                                                      disable_dynamic=disable_dynamic)
    progress.stage()
    wrap_clip(clip)
    if packed:
        packed.attach(clip.patcher)
    recipe.attach(clip.patcher)
    return clip


@register_loader(TEXT_ENCODER)
def _patcher(*paths: str, **options) -> comfy.model_patcher.ModelPatcher:
    """The encoder again, for recipes."""
    return load_text_encoder(list(paths), **options).patcher


def _weights_of(paths: list[str], mmproj: str | None, progress: Progress,
                pack_to: str | None) -> tuple[list[Weights], Packed | None]:
    """The state dict of each file under the host's names, and how they were packed.

    The mmproj file goes to the encoder that has a place for it.
    """
    files = [_Encoder(path, progress, pack_to) for path in paths]
    if mmproj not in (AUTO, None):
        vision = open_weights(mmproj)
        for file in files:
            if file.takes(vision, refuse=len(files) == 1):
                break
        else:
            raise WeightFileError(
                f"{vision.path.name} fits none of {', '.join(file.name for file in files)}, of"
                " which none is an encoder with that kind of vision tower. Pick another mmproj"
                " file, or none.")
    elif mmproj == AUTO:
        for file in files:
            file.find_vision()
    weights = [file.converted() for file in progress.track(files)]
    if not pack_to:
        return weights, None
    return weights, Packed.together(
        [pack_weights(file.file, part, pack_to, progress) for file, part in zip(files, weights)]
    )


class _Encoder:
    """One file on its way from names and bytes to the host's names."""

    def __init__(self, path: str, progress: Progress, pack_to: str | None):
        self.path, self.name = Path(path), os.path.basename(path)
        self.arch = self.file = None
        if not needs_own_reader(path, pack_to):
            weights, metadata = comfy.utils.load_torch_file(path, safe_load=True,
                                                            return_metadata=True)
            self.weights, self.metadata = comfy.utils.convert_old_quants(
                weights, model_prefix="", metadata=metadata)
            progress.stage()
            return
        self.file = file = open_weights(path)
        weights, self.metadata = file.state_dict(progress.track), file.metadata
        if not pack_to:
            reject_unread_layers(file, weights)
        self.weights = _encoder_of(weights)
        if self.path.is_dir():
            found = comfy.sd.detect_te_model(self.weights)
            self.weights |= saved_tokenizer(self.path,
                                            TOKENIZER_OF.get(found and found.name, SENTENCEPIECE))
        if pack_to:
            self.weights = as_tensors(file, self.weights)
        self.arch = arch_of(self.weights)
        if self.arch is None and any(name.startswith(("v.blk.", "mm.")) for name in self.weights):
            raise WeightFileError(
                f"{self.name} is the vision part (mmproj) of a text encoder, expected the encoder."
                " Pick that here, and this file in the mmproj input of Load Text Encoder"
                " (Featherweight).")

    def takes(self, vision: WeightFile, refuse: bool) -> bool:
        """Add the tensors of an mmproj file. refuse: raise WeightFileError where it does not
        fit."""
        if self.arch is None:
            return False
        tower = strip_prefix(vision.state_dict())
        try:
            widths = self.arch.vision_width(self.weights, tower)
        except (
            KeyError,
            IndexError,
        ):  # a tensor that the family's towers have is missing, or of another shape
            widths = None
        if widths and widths[0] == widths[1]:
            self.weights |= tower
            log.info("[Featherweight] %s sees through %s", self.name, vision.path.name)
            return True
        if refuse and widths:
            raise WeightFileError(
                f"{vision.path.name} gives pictures a width of {widths[1]}, {self.name} has"
                f" {widths[0]}: they are not of one model. Pick the mmproj file that was published"
                f" with {self.name}.")
        return False

    def find_vision(self):
        """Add the mmproj file that lies beside this one and fits; of several, the one with the most
        similar name."""
        if (
            self.arch is None
            or not self.arch.wants_vision(self.metadata)
            or self.path.suffix.lower() != ".gguf"
        ):
            return
        siblings = [
            path for path in self.path.parent.glob("*mmproj*") if path.suffix.lower() == ".gguf"
        ]
        siblings.sort(key=lambda path: -difflib.SequenceMatcher(None, path.stem.lower(),
                                                                self.path.stem.lower()).ratio())
        if not any(self.takes_quietly(path) for path in siblings):
            log.info(
                "[Featherweight] %s has no mmproj file beside it that fits: a workflow that shows"
                " it pictures will not work. Put it there, or pick it in Load Text Encoder"
                " (Featherweight).", self.name)

    def takes_quietly(self, path: Path) -> bool:
        """Add the tensors of an mmproj file that nobody picked, where it fits. One that cannot be
        read is named in the log."""
        try:
            return self.takes(open_weights(path), refuse=False)
        except WeightFileError as error:
            log.warning("[Featherweight] %s", error)
            return False

    def converted(self) -> Weights:
        """The weights under the host's names, with what the host builds the tokenizer from."""
        if self.arch is None:
            # GGUF has no uint8.
            return self.weights | {name: self.weights[name].to(torch.uint8, copy=True)
                                   for name in TOKENIZER_NAMES if name in self.weights}
        try:
            tokenizer = self._tokenizer()
        except KeyError as error:
            # `reject_missing_tokenizers` tells what is missing beside the weights
            if self.path.suffix.lower() != ".gguf":
                return self.arch.convert(self.weights, self.metadata)
            raise WeightFileError(
                f"{self.name} has no {error.args[0]} in its metadata, from which its tokenizer is"
                " made. Get another conversion of the model.") from error
        except TokenizerError as error:
            raise WeightFileError(
                f"{self.name}: in its metadata {error}. Get another conversion of the model."
            ) from error
        return self.arch.convert(self.weights, self.metadata) | tokenizer

    def _tokenizer(self) -> Weights:
        """What `Arch.tokenizer` makes of the file; once for each state of the file. Raises KeyError
        for missing metadata."""
        # a folder has more files than those of the weights
        state = self.path, FileState.of(self.path), self.file.states
        if state not in TOKENIZERS:
            made = self.arch.tokenizer(self.weights, self.metadata)
            # Copied: one that is a tensor of the file would keep the whole file mapped.
            TOKENIZERS[state] = {name: tensor.clone() for name, tensor in made.items()}
            if len(TOKENIZERS) > TOKENIZERS_KEPT:
                del TOKENIZERS[next(iter(TOKENIZERS))]
        return TOKENIZERS[state]


def _encoder_of(weights: Weights) -> Weights:
    """The weights of a file or folder under their encoder's own names, without those of what it is
    a part of."""
    weights = strip_prefix(weights)
    return unwrap_language_model(weights) if comfy.sd.detect_te_model(weights) is None else weights


def _check(paths: list[str], weights: list[Weights], clip_type: str):
    """Raise WeightFileError for files that are no text encoders, or none for this type."""
    names = [os.path.basename(path) for path in paths]
    kinds = []
    for name, part in zip(names, weights):
        found = comfy.sd.detect_te_model(part)
        kinds.append(found and encoder_family(found.name, part))
        # LTX-2 takes a projection from a file of its own or its whole checkpoint.
        if (
            found is None
            and not comfy.text_encoders.lt.sd_detect([part])
            and is_diffusion_model(part)
        ):
            raise WeightFileError(
                f"{name} is a diffusion model, expected a text encoder. Pick it in Load Diffusion"
                " Model (Featherweight).")
    if not any(kinds):
        raise WeightFileError(
            f"{' and '.join(names)} hold{'' if names[1:] else 's'} no text encoder that this"
            f" ComfyUI knows ({len(weights[0])} tensors, first"
            f" {next(iter(weights[0]), 'none')!r}). Update ComfyUI if the model is new, or pick"
            " another file."
        )
    warning = reject_wrong_encoders(names, kinds, clip_type)
    if warning:
        log.warning("[Featherweight] %s", warning)
    reject_missing_tokenizers(names, kinds, weights)
    for name, kind, part in zip(names, kinds, weights):
        log.info("[Featherweight] %s: %s, %s bytes held", name, TITLES.get(kind, kind),
                 sum(tensor.nbytes for tensor in part.values()))


@contextlib.contextmanager
def _explain_other_sizes(paths: list[str]):
    """Raise WeightFileError where the host takes weights by their names for a model of another
    size."""
    try:
        yield
    except RuntimeError as error:
        other = shape_mismatch_text(error)
        if other is None:
            raise
        names = " and ".join(map(os.path.basename, paths))
        raise WeightFileError(
            f"{names}: {other} Get the size of the model that the workflow is for.") from error
