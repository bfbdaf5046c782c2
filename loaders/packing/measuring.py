"""Measuring a model: runs it a little, and gives a `Sensitivity`."""
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch

from ..progress import Progress
from .collect import Collector, dense_weight, linear_layers, shapes_of
from .costs import Costs, costs_of
from .runs import Drawing, Step, load, noise_prompts
from .sensitivity import Sensitivity

# How thoroughly the costs are measured: how many kept steps are run for each layer, and whether for each of its types.
THOROUGHNESS = {"no runs": (0, False), "one run per layer": (4, False), "one run per layer and type": (4, True)}
DEFAULT = "one run per layer"
LIKE = 1e-3  # how much the model's outputs may differ for a partial measurement to be one of the same


@torch.no_grad()
def measure(patcher, drawing: Drawing, thoroughness: str = DEFAULT, partial: str | os.PathLike | None = None) -> Sensitivity:
    """Draws a few pictures, with the moments of every layer's inputs collected, then packs one layer after another.

    patcher: the host's ModelPatcher; it and its model are left as they were, whatever ends this. drawing: without prompts it
    draws from noise for a prompt. partial: a file that keeps the costs measured so far, from which the same measurement goes
    on; whoever has saved the result removes it. Raises WeightFileError where the model needs a prompt.
    """
    layers = linear_layers(patcher.model)
    count, every_type = THOROUGHNESS[thoroughness]
    if not drawing.prompts:
        drawing = dataclasses.replace(drawing, prompts=noise_prompts(patcher, drawing, drawing.samples))
    progress = Progress(2)
    drawn = iter(progress.track(range(drawing.total)))
    kept, picked = [], set(_picked(drawing, count))

    def seen(number: int, step: Step):
        next(drawn, None)
        collector.next_step(number)
        if number in picked:
            kept.append(step)

    with Collector(layers) as collector:
        drawing.run(patcher, seen)
    for _ in drawn:  # a sampler may take fewer steps
        pass
    load(patcher)
    costs = Costs(patcher.model, kept) if count else None
    some = [*layers.values()][::max(1, len(layers) // 4)]
    sums = [dense_weight(layer, patcher.load_device).double().sum().item() for layer in some]
    known = _Partial(partial, layers, drawing, thoroughness, costs.power if costs else [], sums)
    done = iter(progress.track(range(len(layers))))

    def after():
        next(done)
        known.write()

    costs_of(layers, collector.of, known.costs, lambda layer: dense_weight(layer, patcher.load_device), costs, every_type,
             after)
    for _ in done:
        pass
    shapes = {name: shape for name, shape in shapes_of(patcher.model).items() if name in layers}
    about = {"model": type(patcher.model).__name__, "samples": drawing.samples, "steps": drawing.steps, "seed": drawing.seed,
             "cfg": drawing.cfg, "thoroughness": thoroughness, "columns_of_a_block": collector.block}
    return Sensitivity(known.costs, shapes, about, _moments=collector.of)


def _picked(drawing: Drawing, count: int) -> list[int]:
    """Numbers of the steps that are kept, spread over pictures and over noise levels."""
    order = torch.randperm(drawing.total, generator=torch.Generator().manual_seed(drawing.seed))
    return sorted(order[:count].tolist())


def _digest(value) -> str:
    """Of tensors, and whatever else the host's CONDITIONING and LATENT hold, in lists and dictionaries."""
    digest = hashlib.sha256()

    def add(part):
        if isinstance(part, dict):
            part = [item for pair in part.items() for item in pair]
        if isinstance(part, (list, tuple)):
            digest.update(f"{len(part)} of ".encode())
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor) and not part.is_nested:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif part is None or isinstance(part, (str, int, float)):
            digest.update(f"{part!r};".encode())
        else:
            digest.update(type(part).__name__.encode())

    add(value)
    return digest.hexdigest()


class _Partial:
    """Costs measured so far, in a file: they are taken from it only where model and settings are the same."""

    def __init__(self, path, layers, drawing: Drawing, thoroughness: str, power: list[float], sums: list[float]):
        """sums: of the values of some weights, by which another model of the same layers is told."""
        self.path = None if path is None else Path(path)
        self.key = [thoroughness, drawing.samples, drawing.steps, drawing.seed, drawing.cfg, list(layers), sums,
                    _digest([drawing.prompts, drawing.negative, drawing.latent])]
        self.power, self.costs = power, {}
        try:
            found = json.loads(self.path.read_text()) if self.path else {}
            if found.get("key") == self.key and len(found["power"]) == len(power) and all(
                    abs(old - new) <= LIKE * new for old, new in zip(found["power"], power)):
                self.costs = found["costs"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing to go on from

    def write(self):
        if self.path:
            with contextlib.suppress(OSError):  # a drive that is full costs what could be gone on from, not the measurement
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps({"key": self.key, "power": self.power, "costs": self.costs}))
