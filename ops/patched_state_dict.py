"""A patched model's state dict, as nodes read it that compute with weights."""
import collections
from collections.abc import Callable, Iterable, Mapping, MutableMapping

import torch


class PatchedWeights(MutableMapping, dict):
    """A state dict that gives packed weights dense, with their patches in them, whenever they are
    read.

    In every way of reading a dict: lookups, `get`, `items`, `values`, `dict(...)`, `**`. Going over
    `items` or `values` dequantises one weight at a time, `copy` and `|` none before they are read,
    and whoever only lists names or counts them none.

    weights: name -> tensor. lazy: the names of those that `dense` (name -> tensor) makes when they
    are read.
    """

    __len__, __contains__, __reversed__, clear = (
        dict.__len__,
        dict.__contains__,
        dict.__reversed__,
        dict.clear,
    )

    def __init__(self, weights: dict[str, torch.Tensor], lazy: Iterable[str],
                 dense: Callable[[str], torch.Tensor]):
        dict.__init__(self, weights)
        self._lazy = dict.fromkeys(lazy)
        self._dense = dense

    def __getitem__(self, key: str) -> torch.Tensor:
        value = dict.__getitem__(self, key)
        return self._apart(key, self._dense(key)) if key in self._lazy else value

    def __setitem__(self, key: str, value):
        self._lazy.pop(key, None)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str):
        self._lazy.pop(key, None)
        dict.__delitem__(self, key)

    # where a subclass has its own, dict(...) and ** ask `__getitem__` for each value
    def __iter__(self):
        return dict.__iter__(self)

    def _apart(self, key: str, dense: torch.Tensor) -> torch.Tensor:
        """`dense` in a storage of a size that no other lazy weight has.

        A dequantised weight may lie where the one before it lay. safetensors takes two of one
        address and size for one.
        """
        names = list(self._lazy)
        size = -(-dense.numel() // len(names)) * len(names) + names.index(key)
        return dense.new_empty(size)[:dense.numel()].view(dense.shape).copy_(dense)

    def copy(self) -> "PatchedWeights":
        return PatchedWeights({key: dict.__getitem__(self, key) for key in self}, self._lazy,
                              self._dense)

    __copy__ = copy

    def __or__(self, other) -> "PatchedWeights":
        if not isinstance(other, Mapping):
            return NotImplemented
        both = self.copy()
        both.update(other)
        return both

    def __ior__(self, other) -> "PatchedWeights":
        self.update(other)
        return self

    def __reduce_ex__(self, protocol):
        return collections.OrderedDict, (), None, None, iter(self.items())  # as torch.load takes it
