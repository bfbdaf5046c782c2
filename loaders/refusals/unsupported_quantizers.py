"""Rejects files of unsupported quantisers, recognised by the names of their tensors, and weights
that need inputs which are rotated while a model runs.

Sources: compressed-tensors 0.20.0 `transform/transform_args.py`, auto-round 0.16.1
`auto_round/algorithms/transforms`.
"""
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..container.weight_file import WeightFile, WeightFileError, safe_repr

GET_OTHER_FORMAT = (
    "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types.")

# End of a tensor's name -> what has such tensors.
UNSUPPORTED_QUANTIZERS = {
    r"\.experts\.\w+_(blocks|scales)$": "experts quantized in MXFP4",
    r"(^|\.)packed_weight_indices$": "layers quantized by OrbitQuant",
    r"(^|\.)(encoded_exponent|sign_mantissa)$": "layers quantized by DFloat11",
}


def find_unsupported_quantizer(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns what is quantized so that it is not supported, and the name of a tensor of it; None
    where nothing is."""
    names = list(names)
    return next(((what, name) for pattern, what in UNSUPPORTED_QUANTIZERS.items() for name in names
                 if re.search(pattern, name)), None)


def reject_unsupported_quantizers(file: WeightFile, tensors: Collection[str]):
    """Raises WeightFileError if a tensor of the file is of an unsupported quantiser, or if inputs
    of its layers have to be rotated."""
    if has_rotated_inputs(file.quantization):
        raise WeightFileError(
            f"{file.name}: its config says that inputs of its layers are rotated while it"
            f" runs, which is not supported. {GET_OTHER_FORMAT}")
    if found := find_unsupported_quantizer(tensors):
        what, name = found
        raise file.error_at(name, f"{safe_repr(name)} is part of {what}, which is not supported",
                            GET_OTHER_FORMAT)


def has_rotated_inputs(settings: Mapping[str, Any]) -> bool:
    """Returns whether a config says that layers rotate inputs or outputs at run time."""
    if settings.get("rotation_config") or settings.get("spinquant_config"):
        return True
    transforms = settings.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    schemes = groups.values() if isinstance(groups, dict) else ()
    applied = [scheme.get("apply") for scheme in schemes if isinstance(scheme, dict)]
    return any(isinstance(given, dict) and not str(given.get("location")).startswith("weight_")
               for each in applied if isinstance(each, list) for given in each)
