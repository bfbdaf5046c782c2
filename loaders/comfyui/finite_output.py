"""Says which weights of a file are not finite, where the output of its model is not."""
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...ops.tensor.packed_layout import QuantizedTensor
from ...ops.tensor.row_slicing import dense
from ..container.weight_file import DOWNLOAD_AGAIN, WeightFileError, safe_repr
from ..name_lists import join_some
from ..refusals.read_anyway import READ_ANYWAY, reads_anyway


class FiniteOutput:
    """A hook of a model that is called after each of its steps.

    A file stays mapped, and to look at all of it while it loads would cost as much as reading it.
    So its weights are looked at once, after the first output that is not finite.

    Attributes:
        name: of the file, or of several.
        has_looked: whether the weights were found to be finite.
    """

    def __init__(self, name: str):
        self.name = name
        self.has_looked = False

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any):
        """Raises WeightFileError if the output is not finite because of weights of the file."""
        if self.has_looked or torch.compiler.is_compiling() or (  # of a graph no value is known
                torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()) or (
                _is_finite(output) or reads_anyway()):
            return
        before = _patched_weights(module)
        damaged = [name for name, weight in (*module.named_parameters(), *module.named_buffers())
                   if not _is_finite(before.get(id(weight), weight))]
        self.has_looked = not damaged
        if damaged:
            raise WeightFileError(
                f"{self.name}: {join_some(map(safe_repr, damaged))}"
                f" {'have' if damaged[1:] else 'has'} values that are not finite, so the output of"
                f" the model is not. {DOWNLOAD_AGAIN} {READ_ANYWAY}")


def _is_finite(value: Any) -> bool:
    """Returns whether a tensor of floats, packed or not, or all of several are finite."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_finite, value))
    if not isinstance(value, torch.Tensor) or value.is_meta or not value.is_floating_point():
        return True
    value = dense(value.detach()) if isinstance(value, QuantizedTensor) else value
    return bool((value.float() if value.itemsize == 1 else value).isfinite().all())


def _patched_weights(module: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Returns `id` of each weight that ComfyUI has patched in its place -> its value before."""
    patchers = [loaded.model for loaded in comfy.model_management.current_loaded_models]
    return {id(comfy.utils.get_attr(patcher.model, key)): before.weight for patcher in patchers
            if patcher is not None and any(each is module for each in patcher.model.modules())
            for key, before in patcher.backup.items()}
