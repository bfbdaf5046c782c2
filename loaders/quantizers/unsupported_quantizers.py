"""Rejects files of unsupported quantisers, recognised by the names of their tensors, and weights
that need inputs which are rotated while a model runs.

Sources: compressed-tensors 0.20.0 `transform/transform_args.py`, auto-round 0.16.1
`auto_round/algorithms/transforms`.
"""
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..files.container import WeightFile, WeightFileError, safe_repr

GET_OTHER_FORMAT = (
    "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types.")

# End of a tensor's name -> what the tensor is.
UNSUPPORTED_QUANTIZERS = {
    r"\.experts\.\w+_(blocks|scales)$":
        "part of experts quantized in MXFP4, which is not supported",
}


def reject_unsupported_quantizers(file: WeightFile, tensors: Collection[str]):
    """Raises WeightFileError if a tensor of the file is of an unsupported quantiser, or if inputs
    of its layers have to be rotated."""
    if has_rotated_inputs(file.quantization):
        raise WeightFileError(
            f"{file.path.name}: its config says that inputs of its layers are rotated while it"
            f" runs, which is not supported. {GET_OTHER_FORMAT}")
    for pattern, what in UNSUPPORTED_QUANTIZERS.items():
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name is not None:
            raise file.error_at(name, f"{safe_repr(name)} is {what}", GET_OTHER_FORMAT)


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
