"""Finds the mmproj file of a text encoder: its vision part, which llama.cpp writes apart."""
import difflib
from pathlib import Path

from ...ops.log import log
from ..comfyui.comfy_quant_weights import read_marked
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFile, WeightFileError
from ..encoders.arch import strip_prefix
from ..files.open_weights import open_weights
from .encoder_file import EncoderFile

SIMILAR = 0.6  # names of an encoder and of its mmproj file
AUDIO_TOWER = "a.blk.0.attn_q.weight"


def find_vision(encoder: EncoderFile):
    """Adds the mmproj file next to an encoder that fits and has the most similar name."""
    if (
        encoder.arch is None
        or not encoder.arch.wants_vision(encoder.metadata)
        or encoder.path.suffix.lower() != ".gguf"
    ):
        return
    siblings = [
        path for path in encoder.path.parent.glob("*mmproj*") if path.suffix.lower() == ".gguf"
    ]
    siblings.sort(key=lambda path: _similarity(encoder, path), reverse=True)
    if not any(_try_vision(encoder, path) for path in siblings):
        log.info(
            "%s has no mmproj file next to it that fits: a workflow that shows"
            " it images will not work. Put it there, or pick it in Load Text Encoder"
            " (GGUF, Featherweight).", encoder.name)


def _similarity(encoder: EncoderFile, path: Path) -> float:
    """Returns how similar the names of a file and of an encoder are, 0 to 1."""
    return difflib.SequenceMatcher(None, path.stem.lower(), encoder.path.stem.lower()).ratio()


def _try_vision(encoder: EncoderFile, path: Path) -> bool:
    """Adds the tensors of an mmproj file that the user has not picked, if it is readable and
    fits."""
    try:
        return add_vision(encoder, open_weights(path), required=False)
    except WeightFileError as error:
        log.warning("%s", error)
        encoder.tower_notes.append(str(error))
        return False


def add_vision(encoder: EncoderFile, vision: WeightFile, required: bool) -> bool:
    """Adds the tensors of an mmproj file to an encoder if it fits; returns whether it does.

    Raises:
        WeightFileError: if it has another width and is `required` to fit.
    """
    if encoder.arch is None:
        return False
    tower = strip_prefix(read_marked(vision))
    try:
        widths = encoder.arch.vision_width(encoder.weights, tower)
    except (KeyError, IndexError):  # a tensor is missing or has another shape
        widths = None
    if widths is None and _similarity(encoder, vision.path) > SIMILAR:
        encoder.tower_notes.append(
            f"{vision.path.name} is not used, and {encoder.name} cannot take images: it is of"
            f" another encoder, or lacks weights. {DOWNLOAD_AGAIN}")
    if widths and widths[0] == widths[1]:
        encoder.weights |= tower
        encoder.tower, encoder.tower_notes = vision.path.name, []
        if AUDIO_TOWER in tower and not any(name.startswith("mm.a.") for name in tower):
            encoder.tower_notes.append(
                f"{encoder.tower} lacks what turns sound into words ('mm.a.…'), and {encoder.name}"
                f" cannot take sound. {DOWNLOAD_AGAIN}")
        log.info("%s takes its vision part from %s", encoder.name, vision.path.name)
        return True
    if required and widths:
        raise WeightFileError(
            f"{vision.path.name} gives images a width of {widths[1]}, {encoder.name} has"
            f" {widths[0]}: they are of different models. Pick the mmproj file that was"
            f" published with {encoder.name}.")
    return False
