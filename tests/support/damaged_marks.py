"""Files with weights in ComfyUI's own formats that are damaged."""
import re

import pytest
from pack_api import WeightFileError, open_weights

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.models.loader_choice import needs_own_reader


def assert_refused(path, message: str):
    """The weight `L` of `model.safetensors` is refused in one sentence about it and one of advice.

    message: regular expression.
    """
    assert needs_own_reader(path)
    file = open_weights(path)
    with pytest.raises(WeightFileError) as error:
        as_tensors(file, read_marked(file), formats=())
    text = str(error.value)
    assert re.match(rf"model\.safetensors: 'L.weight'.*({message})", text), text
    assert re.search(r"\. [A-Z].*\.$", text) and "\n" not in text and len(text) < 500
