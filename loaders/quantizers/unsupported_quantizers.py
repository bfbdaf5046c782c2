"""Rejects files of unsupported quantisers, recognised by the names of their tensors."""
import re
from collections.abc import Collection

from ..files.container import WeightFile, safe_repr

GET_OTHER_FORMAT = (
    "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types.")

# End of a tensor's name -> what the tensor is.
UNSUPPORTED_QUANTIZERS = {
    r"\.experts\.\w+_(blocks|scales)$":
        "part of experts quantised in MXFP4, which is not supported",
}


def reject_unsupported_quantizers(file: WeightFile, tensors: Collection[str]):
    """Raises WeightFileError if a tensor of the file is of an unsupported quantiser."""
    for pattern, what in UNSUPPORTED_QUANTIZERS.items():
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name is not None:
            raise file.error_at(name, f"{safe_repr(name)} is {what}", GET_OTHER_FORMAT)
