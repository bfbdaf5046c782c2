"""Loads text encoders from weight files and folders as the host's own CLIP, with packed weights."""
import collections
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.lt
import torch

from ...ops.layers.comfyui_operations import operations_for
from ...ops.layers.load_hooks import dequantize_plain_parameters
from ...ops.log import log
from ..comfyui.comfy_quant_weights import in_parts
from ..comfyui.compute import encoder_formats
from ..comfyui.contents import encoder_comfy_keys, file_contents
from ..comfyui.detection import (
    UNKNOWN_ERRORS,
    explain_build_errors,
    is_diffusion_model,
    shape_mismatch_text,
)
from ..comfyui.keep_packed import wrap_clip
from ..comfyui.load_check import check_load
from ..comfyui.weight_keys import to_comfy_keys
from ..container.weight_file import WeightFileError, model_name
from ..encoders.arch import SENTENCEPIECE, Weights
from ..encoders.encoder_sets import (
    TEXT_ALONE,
    TITLES,
    encoder_family,
    reject_missing_tokenizers,
    reject_wrong_encoders,
)
from ..encoders.missing_towers import omit_missing_towers
from ..encoders.type_choice import AUTOMATIC as AUTOMATIC_TYPE
from ..encoders.type_choice import choose_type
from ..files.open_weights import open_weights
from ..progress import Progress
from ..recipe import register_loader
from ..refusals.wrong_kind import describe_other_kind
from .encoder_file import EncoderFile
from .fit_device import encoder_targets
from .load_options import LoadOptions
from .loader_choice import needs_own_reader
from .mmproj import add_vision, find_vision
from .pack_on_load import PackStats, PackTo, may_have_host_formats, pack_weights

TEXT_ENCODER = "text encoder"  # name of the loader in recipes
TYPE_ADVICE = ("Choose the type of model that it is for at `type`, or get the size that the"
               " workflow is for.")
AUTO = "auto"  # use the mmproj file next to the encoder


def load_text_encoder(paths: list[str], clip_type: str = "stable_diffusion",
                      embedding_directory: list[str] | None = None, mmproj: str | None = AUTO,
                      **options: Any) -> comfy.sd.CLIP:
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
        options: of `LoadOptions`. Several files share a size by their bytes.

    Raises:
        WeightFileError: if a file cannot be read, or if they are not text encoders of this type.
    """
    if clip_type == AUTOMATIC_TYPE:
        clip_type = _type_of_files(paths)
    host_type = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    asked = LoadOptions(**options)
    recipe = asked.recipe(TEXT_ENCODER, *paths, clip_type=clip_type, mmproj=mmproj,
                          embedding_directory=embedding_directory)
    device = asked.device or comfy.model_management.text_encoder_device()
    formats = encoder_formats(asked.host_formats, device)
    targets = encoder_targets(asked.pack_to, paths, device)
    by_the_host = not any(needs_own_reader(path, target, formats)
                          for path, target in zip(paths, targets.files))
    if by_the_host and mmproj in (AUTO, None):
        clip = _load_by_the_host(paths, embedding_directory, host_type, dict(asked.model_options),
                                 asked.disable_dynamic)
        if clip is not None:
            targets.attach(clip.patcher)
            if asked.disable_dynamic or targets.text:
                recipe.attach(clip.patcher)
            return clip
    if mmproj == AUTO and clip_type in TEXT_ALONE:
        mmproj = None
    packing = ["packing" for target in targets.files if target]
    progress = Progress(*["reading"] * len(paths), "converting", *packing, "building the model")
    notes: list[str] = []
    weights, pack_stats, towers = _read_weights(paths, mmproj, progress, targets.files, formats,
                                                notes, device, clip_type)
    for name, part in zip(map(model_name, paths), weights):
        log.info("%s: %s, %s bytes in memory", name, TITLES.get(_family_of(name, part) or ""),
                 sum(tensor.nbytes for tensor in part.values()))
    if clip_type == "ltxv":
        # The host looks for the tokenizer in the first file.
        weights.sort(key=lambda part: SENTENCEPIECE not in part)
    operations = operations_for(
        collections.ChainMap(*weights), full_precision=True, compute=asked.compute)
    with (
        dequantize_plain_parameters(),
        omit_missing_towers(paths),
        explain_build_errors(_names(paths), TYPE_ADVICE, LookupError, NameError),
        check_load(_names(paths) + "".join(f" (with {tower})" for tower in towers), notes) as check,
    ):
        clip = comfy.sd.load_text_encoder_state_dicts(
            weights, embedding_directory=embedding_directory, clip_type=host_type,
            model_options={**asked.model_options, "custom_operations": operations},
            disable_dynamic=asked.disable_dynamic)
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


def _load_by_the_host(paths: list[str], *arguments) -> comfy.sd.CLIP | None:
    """Returns the CLIP, None where the host does not know an encoder as it is in its file."""
    try:
        with omit_missing_towers(paths), check_load(_names(paths)) as check:
            clip = comfy.sd.load_clip(list(paths), *arguments)
            check.attach(clip)
        return clip
    except WeightFileError:
        known = [comfy.sd.detect_te_model(file_contents(path).tensors) for path in paths]
        if all(_families_of(paths)) and None in known:  # by other names than the host's
            return None
        raise
    except (RuntimeError, *UNKNOWN_ERRORS) as error:
        if isinstance(error, RuntimeError) and shape_mismatch_text(error) is None:
            raise
        log.debug("ComfyUI does not load %s", paths, exc_info=True)
        return None


def _type_of_files(paths: list[str]) -> str:
    """Returns the type of the model that these encoders are for, by the names and shapes in the
    files."""
    names, families = [model_name(path) for path in paths], _families_of(paths)
    known = {name.lower() for name in comfy.sd.CLIPType.__members__}
    clip_type = choose_type(names, families, known)
    log.info("%s: type %s", _names(paths), clip_type)
    return clip_type


def _families_of(paths: list[str]) -> list[str | None]:
    """Returns `_family_of` each file."""
    return [_family_of(model_name(path), _comfy_keys(path)) for path in paths]


def _comfy_keys(path: str) -> Weights:
    """Returns the tensors of an encoder's file, without values, under the host's names."""
    return encoder_comfy_keys(file_contents(path))[0]


def _family_of(name: str, tensors: Weights) -> str | None:
    """Returns the key of TITLES for the encoder in a file, None where it holds none.

    Raises WeightFileError if it holds a model of another kind.
    """
    te_model = comfy.sd.detect_te_model(tensors)
    # LTX-2 reads a projection from a file of its own or from its whole checkpoint.
    if te_model is None and not comfy.text_encoders.lt.sd_detect([tensors]):
        if is_diffusion_model(to_comfy_keys(dict(tensors))):
            raise WeightFileError(
                f"{name} is a diffusion model, expected a text encoder. Pick it in Load Diffusion"
                " Model (GGUF, Featherweight).")
        if other := describe_other_kind(tensors, "text encoder"):
            raise WeightFileError(
                f"{name} is {other}, expected a text encoder. Pick a text encoder here.")
    return te_model and encoder_family(te_model.name, tensors)


def _names(paths: list[str]) -> str:
    return " and ".join(map(model_name, paths))


def _read_weights(paths: list[str], mmproj: str | None, progress: Progress,
                  targets: Sequence[PackTo | None], formats: frozenset[str], notes: list[str],
                  device: torch.device,
                  clip_type: str) -> tuple[list[Weights], PackStats | None, list[str]]:
    """Reads the state dict of each file, with the host's names, checks and packs it to its target.

    The mmproj file goes to the first encoder that it fits. `notes` gets those of the files. The
    last that is returned are the names of the mmproj files that are used.
    """
    encoders = [EncoderFile(path, progress, target, formats)
                for path, target in zip(paths, targets)]
    for encoder in encoders:
        notes += encoder.file.notes if encoder.file else []
    if mmproj == AUTO:
        for encoder in encoders:
            find_vision(encoder)
    elif mmproj is not None:
        vision = open_weights(mmproj)
        if not any(add_vision(encoder, vision, required=len(encoders) == 1)
                   for encoder in encoders):
            raise WeightFileError(
                f"{vision.path.name} fits none of {', '.join(file.name for file in encoders)}:"
                " none is an encoder with such a vision part. Pick another mmproj file, or"
                " none.")
    for encoder in encoders:
        notes += encoder.tower_notes if mmproj == AUTO or encoder.tower else []
    weights = [encoder.convert() for encoder in progress.track(encoders)]
    _check_encoders(paths, weights, clip_type)
    pack_stats = []
    for index, (encoder, target) in enumerate(zip(encoders, targets)):
        if target and encoder.file:
            pack_stats.append(
                pack_weights(encoder.file, weights[index], target, progress, device=device))
            if may_have_host_formats(target):
                weights[index] = in_parts(weights[index], formats)
    return (weights, PackStats.merge(pack_stats),
            [encoder.tower for encoder in encoders if encoder.tower])


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
