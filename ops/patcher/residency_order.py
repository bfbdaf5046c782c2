"""Chooses which layers of a model stay on its device if not all fit.

A layer that does not stay is copied in whenever it runs. With the host's two streams the copy
begins when computing reaches the previous copied layer, and overlaps the products from there on.
So the distance between copied layers, which follows from the budget, is the lookahead. Of two
adjacent copied layers, the second one's copy overlaps only the first one's product; a layer that
multiplies a single row, such as those that modulate the blocks of Flux, overlaps no other's copy.

A profiled step shows which layers run and how much they multiply. Then the layers that do not stay
are those whose copies all overlap computing on the slowest link. Each takes an interval of the
step's work, from the begin of its copy to the begin of its product, and no two intervals overlap:
the choice is the set of intervals with the most bytes (weighted interval scheduling: J. Kleinberg,
E. Tardos, Algorithm Design, 2006, section 6.1). On a faster link nothing waits; a slower one always
has something to copy. Layers that run more often stay first, layers that do not run stay last.

Before there is a profile, layers stay in an order whose every prefix and suffix is spread evenly
over the model. Small layers always come first, for their copies take as long as those of larger
ones; packed embeddings come last, for only the rows that are looked up are copied.

A profile counts work instead of time: a device still computes when the host has queued its work,
and the count is the same for every run of a step.
"""
import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..layers.packed_layers import Embedding
from ..tensor.packed_layout import is_packed

SMALL = 64 << 10  # bytes of a layer; the host puts smaller ones first in dynamic VRAM too
GOLDEN = (5 ** 0.5 - 1) / 2
HALVINGS = 16  # steps of the search for the link's speed
# The search ends at this multiple of the speed at which copying takes as long as computing.
FASTEST = 1 << 10


class LayerProfile:
    """How often each layer runs in a step, and the work done before it first runs.

    Work is the number of multiplications by weights. In an empty profile each layer runs once.
    """

    def __init__(self):
        self._runs: dict[str, int] = {}
        self._work_before: dict[str, int] = {}
        self._work = 0

    def add(self, name: str, work: int):
        """Counts one run of a layer."""
        self._runs[name] = self._runs.get(name, 0) + 1
        self._work_before.setdefault(name, self._work)
        self._work += work

    def runs(self, name: str) -> int:
        return self._runs.get(name, 0) if self._runs else 1

    def work_before(self, name: str) -> int:
        return self._work_before.get(name, 0)


class ProfileRecorder:
    """Records the profile of a model's step, until it is stopped.

    Args:
        model: The model that runs.
        timestep: The step's, which tells it from the next one.
    """

    def __init__(self, model: torch.nn.Module, timestep: torch.Tensor):
        self.timestep = timestep
        self._profile = LayerProfile()
        self._layers = {
            name: module for name, module in model.named_modules()
            if hasattr(module, "comfy_cast_weights")
        }
        self._hooks = []
        for name, module in self._layers.items():
            hook = functools.partial(_count_run, self._profile, name)
            self._hooks.append(module.register_forward_hook(hook))

    def stop(self) -> LayerProfile:
        """Ends the recording and returns the profile.

        It is empty if the hooks saw half of the weights or less, as in a model that is compiled.
        """
        for hook in self._hooks:
            hook.remove()
        sizes = {
            name: sum(map(torch.numel, module.parameters(recurse=False)))
            for name, module in self._layers.items()
        }
        seen = sum(size for name, size in sizes.items() if self._profile.runs(name))
        return self._profile if 2 * seen > sum(sizes.values()) else LayerProfile()


def _count_run(profile: LayerProfile, name: str, module, inputs, output):
    if not torch.compiler.is_compiling():  # the hook would become part of the compiled code
        profile.add(name, _work(module, output))


def _work(module: torch.nn.Module, output) -> int:
    """Returns how many multiplications by its weight, (N, ...), a layer did for `output`."""
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, torch.Tensor) and weight.ndim and isinstance(output, torch.Tensor)):
        return 0
    return output.numel() // weight.shape[0] * weight.shape.numel()


class LayerEntry(NamedTuple):
    """The part of an entry in the host's load list that follows its sort keys."""

    size: int
    name: str
    module: torch.nn.Module
    params: dict


def layer_entry(entry: tuple) -> LayerEntry:
    """Returns an entry of the host's load list without its sort keys."""
    return LayerEntry(*entry[-4:])


def is_table(module: torch.nn.Module) -> bool:
    """Whether a layer is a packed embedding, which stays off the device."""
    return isinstance(module, Embedding) and is_packed(module.weight)


def golden_ratio_order(count: int) -> list[int]:
    """Returns range(count) in an order whose every prefix and suffix is spread evenly over it."""
    return sorted(range(count), key=lambda number: number * GOLDEN % 1)


def residency_order(entries: Sequence[tuple], budget: float,
                    profile: LayerProfile | None) -> list[tuple]:
    """Sorts the host's entries so that those that should stay on the device come first.

    Args:
        entries: Entries of the host's load list.
        budget: Bytes for the layers that stay.
        profile: The profile of a step, or None before there is one.
    """
    first, others, tables = [], [], []
    for entry in entries:
        layer = layer_entry(entry)
        if layer.size <= SMALL or not hasattr(layer.module, "comfy_cast_weights"):
            first.append(entry)
        elif is_table(layer.module):
            tables.append(entry)
        else:
            others.append(entry)
    ordered = [others[number] for number in golden_ratio_order(len(others))]
    if profile is not None:
        ordered = _order_by_use(ordered, budget - _total_size(first), profile)
    return [*first, *ordered, *tables]


def layers_that_fit(entries: Sequence[tuple], budget: float) -> set[str]:
    """Returns the names of the layers to keep: each, in order, that fits into the bytes left."""
    kept = set()
    for layer in map(layer_entry, entries):
        if layer.size <= budget:
            kept.add(layer.name)
            budget -= layer.size
    return kept


def _order_by_use(entries: list[tuple], budget: float, profile: LayerProfile) -> list[tuple]:
    """Sorts entries by how often they run.

    Of layers that run equally often, and of which only some fit, those whose copies overlap
    computing come last.
    """
    def runs(entry: tuple) -> int:
        return profile.runs(layer_entry(entry).name)

    ordered = []
    for count, group in itertools.groupby(sorted(entries, key=runs, reverse=True), key=runs):
        group = list(group)
        size = _total_size(group)
        copied = set()
        if 0 < budget < size and count:
            layers = sorted((profile.work_before(layer.name), layer.size, layer.name)
                            for layer in map(layer_entry, group))
            work_before, sizes, names = zip(*layers)
            copied = {names[index] for index in overlappable(sizes, work_before, size - budget)}
        ordered += sorted(group, key=lambda entry: layer_entry(entry).name in copied)
        budget -= size
    return ordered


def _total_size(entries: Sequence[tuple]) -> int:
    return sum(layer_entry(entry).size for entry in entries)


def overlappable(sizes: Sequence[int], work_before: Sequence[float], needed: float) -> list[int]:
    """Chooses layers of at least `needed` bytes whose copies overlap computing on the slowest link.

    Args:
        sizes: Bytes of each layer, in the order in which they run.
        work_before: The work of a step before each layer runs, ascending.
        needed: Bytes that do not fit on the device.

    Returns:
        The indices of the chosen layers, ascending. They have fewer bytes if on no link the copies
        of so many overlap computing.
    """
    slow = needed / max(work_before[-1], 1)
    fast = slow * FASTEST
    for _ in range(HALVINGS):
        middle = (slow * fast) ** 0.5
        if sum(sizes[index] for index in _overlappable_at(middle, sizes, work_before)) >= needed:
            fast = middle
        else:
            slow = middle
    return _overlappable_at(fast, sizes, work_before)


def _overlappable_at(speed: float, sizes: Sequence[int], work_before: Sequence[float]) -> list[int]:
    """Chooses the layers of the most bytes whose copies overlap computing.

    Args:
        speed: Bytes that are copied during one unit of work.
        sizes: See `overlappable`.
        work_before: See `overlappable`.
    """
    # For the first n layers: the most bytes, and the choice as a linked list of (index, rest).
    most_bytes: list[int] = [0]
    choices: list[tuple | None] = [None]
    for index, (size, work) in enumerate(zip(sizes, work_before)):
        copy_begin = work - size / speed
        count = bisect.bisect_right(work_before, copy_begin, hi=index)  # layers that begin earlier
        with_layer = most_bytes[count] + size
        if copy_begin >= 0 and with_layer > most_bytes[-1]:
            most_bytes.append(with_layer)
            choices.append((index, choices[count]))
        else:
            most_bytes.append(most_bytes[-1])
            choices.append(choices[-1])
    chosen, rest = [], choices[-1]
    while rest is not None:
        index, rest = rest
        chosen.append(index)
    return chosen[::-1]
