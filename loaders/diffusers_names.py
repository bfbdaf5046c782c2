"""Models in diffusers' names: the host's conversion, for packed weights."""
import bisect
import logging

import comfy.model_detection
import torch

from ..ops.tensor import is_packed
from ..ops.rows import join_rows, take_rows

log = logging.getLogger(__name__)


def from_diffusers(state_dict: dict[str, torch.Tensor], later: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model in diffusers' names and parts (q, k and v apart) under the host's names and whole.

    The host's conversion writes into plain tensors only. It gets row numbers in place of rows, and what it makes of them
    tells where each row of a weight comes from. A weight with a part missing is left out, which the host reports.
    later: what is made of several dense tensors comes as `JoinedRows`, which takes no memory yet.
    """
    if comfy.model_detection.detect_unet_config(state_dict, "") is not None:
        return state_dict
    names = [name for name, tensor in state_dict.items() if tensor.ndim and tensor.numel()]
    starts, numbers, count = [], {}, 0
    for name in names:
        starts.append(count)
        numbers[name] = torch.arange(count, count + len(state_dict[name]))
        count += len(state_dict[name]) + 1  # a gap, so that two tensors never read as one run of rows
    converted = comfy.model_detection.convert_diffusers_mmdit(numbers, "")
    if converted is None:
        return state_dict
    known = set(names).difference(numbers)  # the conversion takes out what it uses
    out = {name: tensor for name, tensor in state_dict.items() if name not in known}
    for target, rows in converted.items():
        parts = []
        for run in rows.tensor_split((rows.diff() != 1).nonzero().flatten() + 1):
            source = bisect.bisect(starts, run[0].item()) - 1
            tensor, first = state_dict[names[source]], run[0].item() - starts[source]
            if source < 0 or first + len(run) > tensor.shape[0]:
                break
            parts.append((tensor, first, first + len(run)))
        else:
            dense = len(parts) > 1 and not any(is_packed(tensor) for tensor, _, _ in parts)
            out[target] = JoinedRows(parts) if later and dense else _rows_joined(target, parts)
    return out


class JoinedRows:
    """A weight made of rows `first` to `last` of several tensors, one below the other. They are put together when asked for."""

    def __init__(self, parts: list[tuple[torch.Tensor, int, int]]):
        self.parts = parts
        tensor = parts[0][0]
        self.dtype, self.shape = tensor.dtype, torch.Size([sum(last - first for _, first, last in parts), *tensor.shape[1:]])

    def numel(self) -> int:
        return self.shape.numel()

    def joined(self) -> torch.Tensor:
        return join_rows([take_rows(tensor, slice(first, last)) for tensor, first, last in self.parts])


def _rows_joined(name: str, parts: list[tuple[torch.Tensor, int, int]]) -> torch.Tensor:
    """Rows `first` to `last` of each tensor, one below the other. Packed where all parts have one packed format."""
    joined = join_rows([take_rows(tensor, slice(first, last)) for tensor, first, last in parts])
    if not is_packed(joined) and any(is_packed(tensor) for tensor, _, _ in parts):
        log.info("[Featherweight] %s is unpacked: its parts have different formats, or blocks across their borders.", name)
    return joined
