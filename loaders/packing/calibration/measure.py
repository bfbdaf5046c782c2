"""Measuring a model: what its layers' inputs are, and how much each layer moves its output when it
is packed in each type.

The model runs a little. Then a layer's error runs beside it: while the model takes the steps that
were kept, what is added to the layer's output is its input times the difference between packed and
given weight. Nothing of the model is exchanged.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ....ops.format import FORMATS
from ....ops.packed_tensor import PackedTensor
from ....ops.quantize import pack_tensor
from ....ops.quantize.method_choice import output_errors
from ....ops.quantize.second_moments import SecondMoments
from ...progress import Progress
from ..planning.packing_rules import HALVES
from ..planning.plan import candidates
from .moment_collector import Collector, dense_weight, linear_layers, shapes_of
from .sampling import SamplingRun, SamplingStep, load, random_conditioning, stop_where_cancelled
from .sensitivity import Sensitivity

# How thoroughly the costs are measured: how many kept steps are run for each layer, and whether for
# each of its types.
THOROUGHNESS = {
    "no runs": (0, False), "one run per layer": (4, False), "one run per layer and type": (4, True)
}
DEFAULT = "one run per layer"
# how much the model's outputs may differ for a partial measurement to be one of the same
LIKE = 1e-3

# of the one run of each layer, by the length of a block: an error well above rounding
RUN_TYPE = {256: "Q3_K", 32: "IQ4_NL"}
ROWS = 256  # of a layer, from which its own loss in each type is told
TINY = 1e-30  # in place of a loss of nothing


@torch.no_grad()
def measure(patcher, drawing: SamplingRun, thoroughness: str = DEFAULT,
            partial: str | os.PathLike | None = None) -> Sensitivity:
    """Draws a few pictures, with the moments of every layer's inputs collected, then packs one
    layer after another.

    patcher: the host's ModelPatcher; it and its model are left as they were, whatever ends this.
    drawing: without prompts it draws from noise for a prompt. partial: a file that keeps the costs
    measured so far, from which the same measurement goes on; whoever has saved the result removes
    it. Raises WeightFileError where the model needs a prompt.
    """
    layers = linear_layers(patcher.model)
    count, every_type = THOROUGHNESS[thoroughness]
    if not drawing.prompts:
        drawing = dataclasses.replace(
            drawing, prompts=random_conditioning(patcher, drawing, drawing.samples))
    progress = Progress(2)
    drawn = iter(progress.track(range(drawing.total)))
    steps, picked = [], set(_choose_layers(drawing, count))

    def seen(number: int, step: SamplingStep):
        next(drawn, None)
        collector.next_step(number)
        if number in picked:
            steps.append(step)

    with Collector(layers) as collector:
        drawing.run(patcher, seen)
    for _ in drawn:  # a sampler may take fewer steps
        pass
    load(patcher)
    costs = Costs(patcher.model, steps) if count else None
    some = [*layers.values()][::max(1, len(layers) // 4)]
    sums = [dense_weight(layer, patcher.load_device).double().sum().item() for layer in some]
    known = _Partial(partial, layers, drawing, thoroughness, costs.power if costs else [], sums)
    for name, layer in progress.track(list(layers.items())):
        moments = collector.of(name)
        if name not in known.costs and moments is not None and types_for(tuple(layer.weight.shape)):
            stop_where_cancelled()
            weight = dense_weight(layer, patcher.load_device)
            known.costs[name] = (losses_of_layer(weight, moments) if costs is None
                                 else costs.of_layer(layer, weight, moments, every_type))
        known.write()
    shapes = {name: shape for name, shape in shapes_of(patcher.model).items() if name in layers}
    about = {
        "model": type(patcher.model).__name__, "samples": drawing.samples, "steps": drawing.steps,
        "seed": drawing.seed, "cfg": drawing.cfg, "thoroughness": thoroughness,
        "columns_of_a_block": collector.block
    }
    return Sensitivity(known.costs, shapes, about, _moments=collector.of)


def _choose_layers(drawing: SamplingRun, count: int) -> list[int]:
    """Numbers of the steps that are kept, spread over pictures and over noise levels."""
    order = torch.randperm(drawing.total, generator=torch.Generator().manual_seed(drawing.seed))
    return sorted(order[:count].tolist())


def _digest(value) -> str:
    """Of tensors, and whatever else the host's CONDITIONING and LATENT hold, in lists and
    dictionaries."""
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
            digest.update(part.detach().cpu().contiguous().view(-1).view(
                torch.uint8).numpy().tobytes())
        elif part is None or isinstance(part, (str, int, float)):
            digest.update(f"{part!r};".encode())
        else:
            digest.update(type(part).__name__.encode())

    add(value)
    return digest.hexdigest()


class _Partial:
    """Costs measured so far, in a file: they are taken from it only where model and settings are
    the same."""

    def __init__(self, path, layers, drawing: SamplingRun, thoroughness: str, power: list[float],
                 sums: list[float]):
        """sums: of the values of some weights, by which another model of the same layers is
        told."""
        self.path = None if path is None else Path(path)
        self.key = [
            thoroughness, drawing.samples, drawing.steps, drawing.seed, drawing.cfg,
            list(layers), sums,
            _digest([drawing.prompts, drawing.negative, drawing.latent])
        ]
        self.power = power
        self.costs: dict[str, dict[str, float]] = {}
        try:
            saved = json.loads(self.path.read_text()) if self.path else {}
            if saved.get("key") == self.key and len(saved["power"]) == len(power) and all(
                    abs(old - new) <= LIKE * new for old, new in zip(saved["power"], power)):
                self.costs = saved["costs"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing to go on from

    def write(self):
        if self.path:
            # a drive that is full costs what could be gone on from, not the measurement
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(
                    json.dumps({"key": self.key, "power": self.power, "costs": self.costs}))


def types_for(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The packed types that a plan for a size chooses among for a matrix, smallest first."""
    return tuple(kind for kind in candidates(shape) if kind not in HALVES)


def run_type(shape: tuple[int, ...]) -> str | None:
    """The type of the one run of a matrix, None where no packed type fits it."""
    return next((kind for kind in RUN_TYPE.values() if kind in types_for(shape)), None)


def quantize_layer(weight: torch.Tensor, kind: str, moments: SecondMoments) -> PackedTensor:
    return pack_tensor(weight, FORMATS[kind], moments=moments)


def weight_errors(weight: torch.Tensor, moments: SecondMoments,
                  kinds: Sequence[str]) -> dict[str, float]:
    """Type -> power of a layer's output error over that of its output, for inputs like those seen,
    from at most `ROWS` rows.

    Without error feedback, which takes much longer and gains about the same in all types.
    """
    rows = sample_rows(weight)
    plain = [pack_tensor(rows, FORMATS[kind], importance=moments.importance) for kind in kinds]
    return dict(zip(kinds, output_errors(rows, plain, moments), strict=True))


def feedback_gain(weight: torch.Tensor, moments: SecondMoments, kind: str, loss: float) -> float:
    """What is left with error feedback of the loss without it."""
    rows = sample_rows(weight)
    return output_errors(rows, [quantize_layer(rows, kind, moments)], moments)[0] / max(loss, TINY)


def sample_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight[::-(-len(weight) // ROWS)].contiguous()


class AddedDelta:
    """While entered, `change`, (N, K), is part of the weight of a linear layer, which is not
    touched."""

    def __init__(self, layer: torch.nn.Module, change: torch.Tensor):
        self.layer, self.change = layer, change

    def __enter__(self):
        self.handle = self.layer.register_forward_hook(self._add)

    def __exit__(self, *_):
        self.handle.remove()

    def _add(self, layer, inputs, output):
        change = self.change.to(inputs[0].device, inputs[0].dtype)
        return output + torch.nn.functional.linear(inputs[0], change).to(output.dtype)


class Costs:
    """Measures what the errors of layers do to the model's output.

    model: the host's BaseModel, loaded. steps: those that are run again for each layer.
    """

    def __init__(self, model, steps: Sequence[SamplingStep]):
        self.model, self.steps = model, steps
        self.dense = self._outputs()
        self.power = [float(output.square().sum()) for output in self.dense]

    def _outputs(self) -> list[torch.Tensor]:
        outputs = []
        for step in self.steps:
            stop_where_cancelled()
            outputs.append(step.run(self.model))
        return outputs

    def output_error(self, layer: torch.nn.Module, weight: torch.Tensor,
                     packed_weight: PackedTensor) -> float:
        """Power of the change of the model's output over that of the output, the mean of the
        steps."""
        with AddedDelta(layer, packed_weight.dequantize() - weight):
            outputs = self._outputs()
        return sum(
            float((output - dense).square().sum()) / power
            for output, dense, power in zip(outputs, self.dense, self.power, strict=True)
        ) / len(self.steps)

    def of_layer(self, layer: torch.nn.Module, weight: torch.Tensor, moments: SecondMoments,
                 every_type: bool) -> dict[str, float]:
        """Type -> cost of a layer: each type run, or one of them run and the others scaled by the
        layer's own loss."""
        kinds = types_for(tuple(weight.shape))
        if every_type:
            return {
                kind: self.output_error(layer, weight, quantize_layer(weight, kind, moments))
                for kind in kinds
            }
        losses, kind = weight_errors(weight, moments, kinds), run_type(tuple(weight.shape))
        error = self.output_error(layer, weight, quantize_layer(weight, kind, moments))
        return {other: error * loss / max(losses[kind], TINY) for other, loss in losses.items()}


def losses_of_layer(weight: torch.Tensor, moments: SecondMoments) -> dict[str, float]:
    """Costs without a run of the model: a layer's own relative losses, with error feedback."""
    shape = tuple(weight.shape)
    losses, kind = weight_errors(weight, moments, types_for(shape)), run_type(shape)
    gain = feedback_gain(weight, moments, kind, losses[kind])
    return {kind: gain * loss for kind, loss in losses.items()}
