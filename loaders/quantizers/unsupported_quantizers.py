"""Rejects files of unsupported quantisers, recognised by the names of their tensors."""
import re
from collections.abc import Collection, Mapping

from ..files.container import WeightFile, safe_repr

OTHER_FORM = "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types."

# End of a tensor's name -> what the tensor is.
UNSUPPORTED_QUANTIZERS = {
    r"\.(qweight|qzeros|g_idx)$":
        "part of a weight of GPTQ or AWQ whose other parts (qweight, qzeros, scales) are missing",
    r"\._weight_(qdata|scale|zero_point)$":
        "part of a weight quantised by torchao whose _weight_qdata is missing",
    r"\.weight\._(data|scale|shift|packed)$":
        "part of a weight quantised by quanto whose weight._data is missing",
    r"\.experts\.\w+_(blocks|scales)$":
        "part of experts quantised in MXFP4, which is not supported",
    r"\.W_q$": "part of a weight quantised by HQQ, which is not supported",
}


def reject_unsupported_quantizers(file: WeightFile, tensors: Collection[str]):
    """Raises WeightFileError if a tensor of the file is of an unsupported quantiser."""
    reject_names(file, tensors, UNSUPPORTED_QUANTIZERS, OTHER_FORM)


def reject_names(file: WeightFile, names: Collection[str], table: Mapping[str, str], advice: str):
    """Raises WeightFileError for the first pattern of a table that is in a tensor's name.

    Args:
        file: the file of the tensors.
        names: of the tensors.
        table: pattern -> what the tensor is.
        advice: what to do.
    """
    for pattern, what in table.items():
        name = next((name for name in names if re.search(pattern, name)), None)
        if name is not None:
            raise file.error_at(name, f"{safe_repr(name)} is {what}", advice)
