"""Inspects model files and loaded models: type, family, tensors, memory, and what else they need.

`inspect` returns an `Inspection` for a file, a folder or a MODEL, also if it cannot be read.
"""
import os

import comfy.model_patcher

from ..comfyui.contents import Contents, file_contents, model_contents, package_parts
from ..container.weight_file import WeightFileError
from .difference import relative_errors
from .identify import Inspection, identify

__all__ = ["Contents", "Inspection", "inspect"]


def inspect(source: str | os.PathLike | comfy.model_patcher.ModelPatcher,
            reference: str | os.PathLike | None = None) -> list[Inspection]:
    """Inspects a file, a MODEL, or each model in a diffusers folder.

    A file that cannot be read is not an error: `Inspection.problem` says why. The host's exception
    for a cancelled prompt is raised.

    Args:
        source: a file, a folder, or a loaded MODEL.
        reference: a file or folder of the same model, to measure each tensor's error against.
    """
    if isinstance(source, comfy.model_patcher.ModelPatcher):
        return [_compare(model_contents(source), reference)]
    parts = package_parts(source)
    if parts:
        references = {} if reference is None else {
            part.name: part for part in package_parts(reference)
        }
        return [_inspect_file(part, references.get(part.name, reference)) for part in parts]
    return [_inspect_file(source, reference)]


def _inspect_file(path: str | os.PathLike, reference: str | os.PathLike | None) -> Inspection:
    try:
        contents = file_contents(path)
    except WeightFileError as error:
        return Inspection(os.path.basename(path), problem=str(error))
    return _compare(contents, reference)


def _compare(contents: Contents, reference: str | os.PathLike | None) -> Inspection:
    inspection = identify(contents)
    if reference is None:
        return inspection
    try:
        inspection.reference = os.path.basename(reference)
        inspection.errors = relative_errors(contents, file_contents(reference))
        if not inspection.errors:
            inspection.no_errors = (
                f"{inspection.reference} has no tensor of the same name and shape; pick a file of"
                " the same model.")
    except WeightFileError as error:
        inspection.no_errors = str(error)
    return inspection
