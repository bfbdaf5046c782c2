"""Finds what other nodes made of a model: weights that only their pack reads, compiled code."""
import torch

from ...ops.tensor.packed_layout import QuantizedTensor
from ..container.weight_file import WeightFileError

OWN = (torch.Tensor, torch.nn.Parameter)
COMPILED = "torch_compile_kwargs"  # in the options of a model that ComfyUI's node compiles


def foreign_class(model: torch.nn.Module) -> str | None:
    """Returns the class of such weights, as ComfyUI-GGUF's GGMLTensor; None: there are none."""
    for weight in (*model.parameters(), *model.buffers()):
        if type(weight) not in OWN and not isinstance(weight, QuantizedTensor):
            return type(weight).__name__
    return None


def reject_foreign_weights(model: torch.nn.Module):
    """Raises WeightFileError for a model with such weights."""
    if found := foreign_class(model):
        raise WeightFileError(
            f"The model has weights of the class {found}, which another pack's loader made and only"
            " that pack can read. Load its file with a loader of ComfyUI or of this pack.")
