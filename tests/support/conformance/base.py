"""What a file holds of one weight, and what becomes of it where the file is damaged.

A module of this package has the name of a quantiser's module, and

- `WRITERS`: name -> function that returns a `Written`;
- `BAD`: name -> (such a function, change, regex of the message). The change is name of a part -> a
  tensor, a function of the part, or None where it is missing; or it is a function of all parts. The
  regex is of what follows the layer and the quantiser, unless it begins with a quoted name itself.
"""
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from pack_api import is_packed, open_weights
from quantizer_writers import save_config
from safetensors.torch import save_file


@dataclass(frozen=True)
class Written:
    """The layer `L` of a file.

    Attributes:
        parts: of the layer, by what their names have behind `L.`.
        values: float32, that a reader must get; None where it must refuse the parts.
        bias: float32, that a reader must get.
        config: quantisation config of the folder; None: the file is read by itself.
        metadata: of the file.
        beside: other tensors of the file, by their whole names.
        held: bytes that the weight may take, by those of the parts; None: no matter how many.
        uncounted: parts whose bytes do not count.
        error: of the values, by the largest; 0: they are equal bit for bit.
        whole_rows: whether rows can be taken without dequantising them.
        has_own_marks: whether its parts tell this quantiser from others that store weights alike.
    """
    parts: Mapping[str, torch.Tensor]
    values: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    config: Mapping | None = None
    metadata: Mapping[str, str] | None = None
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    held: float | None = 1.05
    uncounted: Collection[str] = ("bias",)
    error: float = 0
    whole_rows: bool = True
    has_own_marks: bool = True


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def save(folder, written):
    """Writes `model.safetensors`; returns it, or the folder where that has a config."""
    tensors = {f"L.{name}": part for name, part in written.parts.items()} | dict(written.beside)
    path = folder / "model.safetensors"
    save_file({name: tensor.clone(memory_format=torch.contiguous_format)
               for name, tensor in tensors.items()}, path, written.metadata)
    if written.config is None:
        return path
    save_config(folder, **written.config)
    return folder


def read_weight(folder, parts, **options):
    """The weight of the layer, the only packed one of its file."""
    weights = open_weights(save(folder, Written(parts, **options))).state_dict()
    assert weights.keys() - {"L.bias"} == {"L.weight"} and is_packed(weights["L.weight"])
    return weights["L.weight"]


def grid(title, write, **axes):
    """Name -> writer, for each combination of what the axes list."""
    return each(title, write, *(dict(zip(axes, values))
                                for values in itertools.product(*axes.values())))


def each(title, write, *options):
    """Name -> writer, for each dict of options."""
    return {", ".join([title, *(f"{axis} {value}" for axis, value in chosen.items())]):
            partial(write, **chosen) for chosen in options}


def damaged(good, **cases):
    """Name -> bad case of one writer, of (change, message)."""
    return {name.replace("_", " "): (good, *case) for name, case in cases.items()}


def changed(parts, change):
    """The parts of a layer after a change as `BAD` has them."""
    if callable(change):
        return change(parts)
    parts = dict(parts)
    for name, new in change.items():
        parts[name] = new(parts[name]) if callable(new) else new
    return {name: tensor for name, tensor in parts.items() if tensor is not None}
