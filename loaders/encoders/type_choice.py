"""Chooses the `type` of text encoders by what their files hold."""
from collections.abc import Container, Iterator, Sequence

from ..container.weight_file import WeightFileError
from ..families import MODELS, Model
from .encoder_sets import ANY, TITLES, reject_same_encoders

AUTOMATIC = "automatic"  # in place of a type
SDXL = "sdxl"  # is offered, and is none of the types of the host
# The host's class of models whose encoder needs a projection, which may be in a file of its own.
WITH_PROJECTION = {"LTXAV"}


def choose_type(names: Sequence[str], families: Sequence[str | None],
                known: Container[str]) -> str:
    """Returns the type of the model that these encoders are for.

    Args:
        names: of the files.
        families: of the files, keys of TITLES; None for a file without an encoder.
        known: types that this ComfyUI knows.

    Raises:
        WeightFileError: if the encoders are of several types, which give different results, or of
            none.
    """
    reject_same_encoders(names, families)
    types = _fitting_types(families, known)
    if len(types) == 1:
        return next(iter(types))
    if not types and len(families) == 1:
        return ANY
    titles = " and ".join(
        TITLES.get(family, family) if family else "no text encoder" for family in families)
    subject = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {titles}"
    if not types:
        raise WeightFileError(
            f"{subject}, and no model is known that takes them together. Pick other files, or"
            " choose a type that takes them.")
    *others, last = (f"{clip_type} ({' or '.join(models)})" for clip_type, models in types.items())
    raise WeightFileError(
        f"{subject}, which several models use in different ways. Choose the type of yours:"
        f" {', '.join(others)} or {last}.")


def _fitting_types(families: Sequence[str | None],
                   known: Container[str]) -> dict[str, list[str]]:
    """Returns type -> names of the models that take these encoders, and no others if any does.

    Else of those that work with some of their encoders.
    """
    present = {family for family in families if family is not None}
    has_projection = len(present) < len(families)
    for fits in (_is_complete, _is_part):
        types: dict[str, list[str]] = {}
        for model in _known_models(known):
            if fits(model, present) and (not has_projection or model.host in WITH_PROJECTION):
                names = types.setdefault(model.clip_type or ANY, [])
                names += [model.name] * (model.name not in names)
        if types:
            return types
    return {}


def _known_models(known: Container[str]) -> Iterator[Model]:
    """Yields the models with encoders whose type this ComfyUI knows."""
    for model in MODELS:
        if model.encoders and (model.clip_type in ("", SDXL) or model.clip_type in known):
            yield model


def _is_complete(model: Model, present: set[str]) -> bool:
    groups = model.encoder_groups
    return (len(present) == 1 and present <= set(model.also)) or (
        len(present) == len(groups) and all(group & present for group in groups))


def _is_part(model: Model, present: set[str]) -> bool:
    groups = model.encoder_groups
    return len(present) <= 2 < len(groups) and present <= set().union(*groups)
