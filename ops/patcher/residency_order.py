"""Which layers of a model stay on its device, where not all of them do.

A layer that does not stay is copied in whenever it runs. With the host's two streams its copy
begins when computing reaches the copied layer before it: so the copy hides behind the products from
there on, and how far ahead it begins is how far apart copied layers lie, which follows from the
budget. Two copied layers beside each other hide behind nothing but the first one's product; a layer
that multiplies a single row, as those that modulate the blocks of Flux, hides no other.

Once a step has shown what runs and how much it multiplies, the layers that are left out are those
whose copies need the slowest link to all hide behind computing. Each takes up a part of the step's
work, from where its copy begins to where the layer itself does, and no two parts overlap: what is
chosen is the set of such intervals with the most bytes (weighted interval
scheduling: J. Kleinberg, E. Tardos, Algorithm Design, 2006, section 6.1). Where the link is faster,
nothing is waited for; where it is slower, it always has something to copy. Layers that run more
often than others stay before them, those that do not run at all after them.

Before there is such a step, layers stay in an order of which each beginning, and each end, is
spread evenly over the model. First always come small ones, whose copies take as long as those of
larger ones; last come packed tables, of which only the rows that are asked for travel.

A step is counted, not timed: a device works on while the host is done with its part, and the same
step always shows the same.
"""
import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..layers import Embedding
from ..packed_layout import is_packed

SMALL = 64 << 10  # bytes of a layer; those the host puts first in dynamic VRAM
GOLDEN = (5 ** 0.5 - 1) / 2
HALVINGS = 16  # of the range in which the speed of the link is looked for
# times the speed at which copying takes as long as computing; what it cannot hide nothing will
FASTEST = 1 << 10


class LayerProfile:
    """How often each layer runs in a step, by its name, and the work before it runs first:
    multiplications by weights.

    Where nothing is known, each runs once.
    """

    def __init__(self):
        self._times, self._begins = {}, {}
        self._work = 0

    def add(self, name: str, work: int):
        """A layer has run."""
        self._times[name] = self._times.get(name, 0) + 1
        self._begins.setdefault(name, self._work)
        self._work += work

    def runs(self, name: str) -> int:
        return self._times.get(name, 0) if self._times else 1

    def work_before(self, name: str) -> int:
        return self._begins.get(name, 0)


class ProfileRecorder:
    """Counts a step of a model from now until it is stopped. timestep: the step's, which others
    differ from."""

    def __init__(self, model: torch.nn.Module, timestep: torch.Tensor):
        self.timestep = timestep
        self._step = LayerProfile()
        self._layers = {
            name: module for name, module in model.named_modules()
            if hasattr(module, "comfy_cast_weights")
        }
        self._hooks = [module.register_forward_hook(functools.partial(_count, self._step, name))
                       for name, module in self._layers.items()]

    def stop(self) -> LayerProfile:
        """The step; nothing of it where half of the weights or more ran out of sight, as in layers
        that were compiled."""
        for hook in self._hooks:
            hook.remove()
        sizes = {
            name: sum(map(torch.numel, module.parameters(recurse=False)))
            for name, module in self._layers.items()
        }
        seen = sum(size for name, size in sizes.items() if self._step.runs(name))
        return self._step if 2 * seen > sum(sizes.values()) else LayerProfile()


def _count(step: LayerProfile, name: str, module, inputs, output):
    if not torch.compiler.is_compiling():  # the hook would stay in what is compiled
        step.add(name, _work(module, output))


def _work(module, output) -> int:
    """Multiplications by the weight of a layer of which each row gives one part of the output, at
    every place of it."""
    shape = getattr(getattr(module, "weight", None), "shape", ())
    return (
        output.numel() // shape[0] * shape.numel()
        if len(shape) and isinstance(output, torch.Tensor)
        else 0
    )


class LayerEntry(NamedTuple):
    """What of an entry in the host's list of layers does not depend on what it is sorted by."""
    size: int
    name: str
    module: torch.nn.Module
    params: dict


def layer_entries(entry: tuple) -> LayerEntry:
    return LayerEntry(*entry[-4:])


def is_table(module: torch.nn.Module) -> bool:
    return isinstance(module, Embedding) and is_packed(module.weight)


def golden_ratio_order(count: int) -> list[int]:
    """The numbers below `count` in an order of which each beginning, and each end, is spread evenly
    over them."""
    return sorted(range(count), key=lambda number: number * GOLDEN % 1)


def residency_order(entries: list[tuple], room: float, step: LayerProfile | None) -> list[tuple]:
    """The host's entries, those first that are to stay before others. room: bytes for them. step:
    what one has shown."""
    first, others, tables = [], [], []
    for entry in entries:
        field = layer_entries(entry)
        travels = hasattr(field.module, "comfy_cast_weights")
        group = (
            first
            if not travels or field.size <= SMALL
            else tables
            if is_table(field.module)
            else others
        )
        group.append(entry)
    ordered = [others[number] for number in golden_ratio_order(len(others))]
    if step is not None:
        ordered = _by_use(ordered, room - sum(layer_entries(entry).size for entry in first), step)
    return [*first, *ordered, *tables]


def layers_that_fit(entries: list[tuple], room: float) -> set[str]:
    """Names of the layers that stay, of entries in order, where there are so many bytes for
    them."""
    kept = set()
    for field in map(layer_entries, entries):
        if field.size <= room:
            kept.add(field.name)
            room -= field.size
    return kept


def _by_use(entries: list[tuple], room: float, step: LayerProfile) -> list[tuple]:
    """Entries that run more often before others, and where there is room for some of those that run
    as often, as few times as can be waited for the rest."""
    ordered = []
    for _, group in itertools.groupby(
            sorted(entries, key=lambda entry: -step.runs(layer_entries(entry).name)),
            key=lambda entry: step.runs(layer_entries(entry).name)):
        group = list(group)
        size = sum(layer_entries(entry).size for entry in group)
        running = sorted((step.work_before(field.name), field.size, field.name)
                         for field in map(layer_entries, group) if step.runs(field.name))
        left_out = set()
        if 0 < room < size and running:
            begins, sizes, names = zip(*running)
            left_out = {names[index] for index in overlappable(sizes, begins, size - room)}
        ordered += sorted(group, key=lambda entry: layer_entries(entry).name in left_out)
        room -= size
    return ordered


def overlappable(sizes: Sequence[int], begins: Sequence[float], needed: float) -> list[int]:
    """The layers of at least `needed` bytes whose copies all hide behind computing at the slowest
    speed of the link.

    sizes: bytes of each layer, in the order in which they run. begins: the work of a step before
    each, never less than that before the one before it. Returns their numbers, in that order; fewer
    where no speed hides so much.
    """
    slow = needed / max(begins[-1], 1)
    fast = slow * FASTEST
    for _ in range(HALVINGS):
        middle = (slow * fast) ** 0.5
        if sum(sizes[index] for index in _overlappable_at(middle, sizes, begins)) >= needed:
            fast = middle
        else:
            slow = middle
    return _overlappable_at(fast, sizes, begins)


def _overlappable_at(speed: float, sizes: Sequence[int], begins: Sequence[float]) -> list[int]:
    """The layers of the most bytes whose copies all hide behind computing. speed: bytes in a unit
    of work."""
    # of the first layers, by how many: bytes, and (the last one, what is chosen before it)
    most, last = [0], [None]
    for index, (size, begin) in enumerate(zip(sizes, begins)):
        copy_begins = begin - size / speed
        # at most so many begin before the copy
        before = bisect.bisect_right(begins, copy_begins, hi=index)
        with_it = most[before] + size
        if copy_begins >= 0 and with_it > most[-1]:
            most.append(with_it)
            last.append((index, last[before]))
        else:
            most.append(most[-1])
            last.append(last[-1])
    chosen, rest = [], last[-1]
    while rest is not None:
        index, rest = rest
        chosen.append(index)
    return chosen[::-1]
