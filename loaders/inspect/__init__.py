"""What a model file or a loaded model is: its kind, its tensors, what fits which memory, what else
it needs.

`inspect` is the door: for a file, a folder or a MODEL it gives an `Inspection`, also where that is
nothing that can be read.
"""
import os

import comfy.model_patcher

from ..files.container import WeightFileError
from .contents import Contents, file_contents, model_contents, package_parts
from .difference import relative_errors
from .inspection import Inspection, identify

__all__ = ["Contents", "Inspection", "inspect"]


def inspect(source: str | os.PathLike | comfy.model_patcher.ModelPatcher,
            reference: str | os.PathLike | None = None) -> list[Inspection]:
    """What each model in `source` is: of one file or MODEL one, of a package of diffusers one for
    each folder in it.

    reference: a file of the same model, to measure each tensor's error against. What cannot be read
    is no error here: its Inspection says why. Cancelled by the user, the host's exception goes on.
    """
    if isinstance(source, comfy.model_patcher.ModelPatcher):
        return [_compared(model_contents(source), reference)]
    parts = package_parts(source)
    if parts:
        return [_inspected(part, None) for part in parts]
    return [_inspected(source, reference)]


def _inspected(path, reference) -> Inspection:
    try:
        contents = file_contents(path)
    except WeightFileError as error:
        return Inspection(os.path.basename(path), problem=str(error))
    return _compared(contents, reference)


def _compared(contents: Contents, reference) -> Inspection:
    found = identify(contents)
    if reference is not None:
        try:
            found.reference = os.path.basename(reference)
            found.errors = relative_errors(contents, file_contents(reference))
            if not found.errors:
                found.no_errors = f"{found.reference} has no tensor of the same name and shape; pick a file of the same model."
        except WeightFileError as error:
            found.no_errors = str(error)
    return found
