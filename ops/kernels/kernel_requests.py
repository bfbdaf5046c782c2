"""Requests the kernels that a model's packed layers will use, while the model loads."""
import torch

from .. import kernels
from ..layers.packed_layers import PackedLinear
from ..tensor.packed_layout import is_packed
from . import Case


def prepare_kernels(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None):
    """Requests the kernels for the packed linear layers of a model.

    A kernel that is not requested here is chosen when a layer first needs it.

    Args:
        model: a model of packed layers.
        device: the device it will run on.
        dtype: its compute dtype; None where that is not known yet, then nothing is requested.
    """
    cases = {}
    if dtype is not None:
        for layer in model.modules():
            if isinstance(layer, PackedLinear) and is_packed(layer.weight):
                for packed_format in layer.weight.params.format.formats_within():
                    cases.update(dict.fromkeys(_cases(packed_format.name, dtype, layer.compute)))
    kernels.prepare(device, cases)


def _cases(name: str, dtype: torch.dtype, compute: str) -> list[Case]:
    cases = [Case("dequantize", name, dtype), Case("linear", name, dtype)]
    if compute == "int8":
        cases += [Case("int8_rows", name, torch.int8),
                  Case("int8_tokens", None, dtype)]
    return cases
