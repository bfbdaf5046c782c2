"""Rejects files of unsupported quantisers, recognised by the names of their tensors."""
import re

import torch

from .container import WeightFile, safe_repr

OTHER_FORM = "Get the model as GGUF, bitsandbytes NF4 or int8, or in one of ComfyUI's own types."

# End of a tensor's name, what the tensor is, what to do.
UNSUPPORTED_QUANTIZERS = (
    (
        r"\.(qweight|qzeros|g_idx)$",
        "part of a weight of GPTQ or AWQ whose other parts (qweight, qzeros, scales) are missing",
        OTHER_FORM,
    ),
    (
        r"\._weight_(qdata|scale|zero_point)$",
        "part of a weight quantised by torchao whose _weight_qdata is missing",
        OTHER_FORM,
    ),
    (
        r"\.weight\._(data|scale|shift|packed)$",
        "part of a weight quantised by quanto whose weight._data is missing",
        OTHER_FORM,
    ),
    (
        r"\.experts\.\w+_(blocks|scales)$",
        "part of experts quantised in MXFP4, which is not supported",
        OTHER_FORM,
    ),
    (r"\.W_q$", "part of a weight quantised by HQQ, which is not supported", OTHER_FORM),
)


def reject_unsupported_quantizers(file: WeightFile, tensors: dict[str, torch.Tensor]):
    """Raises WeightFileError if a tensor of the file is of an unsupported quantiser."""
    for pattern, what, advice in UNSUPPORTED_QUANTIZERS:
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name is not None:
            raise file.error_at(name, f"{safe_repr(name)} is {what}", advice)
