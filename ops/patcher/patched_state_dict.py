"""State dict of a patched model, for nodes that compute with the weights."""
import collections
from collections.abc import Callable, Iterable, Mapping, MutableMapping

import torch


class PatchedWeights(MutableMapping, dict):  # pyright: ignore[reportGeneralTypeIssues]
    """A state dict whose packed weights are dequantised and patched each time they are read.

    That holds for every way of reading a dict: lookups, `get`, `items`, `values`, `dict(...)`,
    `**`. Iterating over `items` or `values` dequantises one weight at a time; `copy`, `|`, listing
    the keys and counting them dequantise nothing.

    Args:
        weights: key -> tensor.
        lazy: the keys of the weights that `dense` makes.
        dense: returns the dense, patched weight of a key.
    """

    __len__ = dict.__len__
    __contains__ = dict.__contains__
    __reversed__ = dict.__reversed__
    clear = dict.clear

    def __init__(self, weights: dict[str, torch.Tensor], lazy: Iterable[str],
                 dense: Callable[[str], torch.Tensor]):
        dict.__init__(self, weights)
        self._lazy = dict.fromkeys(lazy)
        self._dense = dense

    def __getitem__(self, key: str) -> torch.Tensor:
        value = dict.__getitem__(self, key)
        return self._own_storage(key, self._dense(key)) if key in self._lazy else value

    def __setitem__(self, key: str, value):
        self._lazy.pop(key, None)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str):
        self._lazy.pop(key, None)
        dict.__delitem__(self, key)

    # dict(...) and ** call `__getitem__` for each value only where a subclass defines `__iter__`
    def __iter__(self):
        return dict.__iter__(self)

    def _own_storage(self, key: str, dense: torch.Tensor) -> torch.Tensor:
        """Copies `dense` to a storage of a size that no other lazy weight has.

        A dequantised weight may get the address of the one before it, and safetensors takes two
        storages of the same address and size for one.
        """
        keys = list(self._lazy)
        size = -(-dense.numel() // len(keys)) * len(keys) + keys.index(key)
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
        return collections.OrderedDict, (), None, None, iter(self.items())  # torch.load reads it
