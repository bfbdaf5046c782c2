"""How much each layer moves a model's output when it is packed in each type.

A layer's error runs beside it: while the model takes the steps that were kept, what is added to the layer's output is its
input times the difference between packed and given weight. Nothing of the model is exchanged.
"""
from collections.abc import Callable, Mapping, Sequence

import torch

from ...ops.format import FORMATS
from ...ops.packed import PackedTensor
from ...ops.packing import pack_tensor
from ...ops.packing.guard import output_errors
from ...ops.packing.moments import Moments
from .plan import candidates
from .rules import HALVES
from .runs import Step, stop_where_cancelled

RUN_TYPE = {256: "Q3_K", 32: "IQ4_NL"}  # of the one run of each layer, by the length of a block: an error well above rounding
ROWS = 256  # of a layer, from which its own loss in each type is told
TINY = 1e-30  # in place of a loss of nothing


def types_for(shape: tuple[int, ...]) -> tuple[str, ...]:
    """The packed types that a plan for a size chooses among for a matrix, smallest first."""
    return tuple(kind for kind in candidates(shape) if kind not in HALVES)


def run_type(shape: tuple[int, ...]) -> str | None:
    """The type of the one run of a matrix, None where no packed type fits it."""
    return next((kind for kind in RUN_TYPE.values() if kind in types_for(shape)), None)


def packed(weight: torch.Tensor, kind: str, moments: Moments) -> PackedTensor:
    return pack_tensor(weight, FORMATS[kind], moments=moments)


def own_losses(weight: torch.Tensor, moments: Moments, kinds: Sequence[str]) -> dict[str, float]:
    """Type -> power of a layer's output error over that of its output, for inputs like those seen, from at most `ROWS` rows.

    Without error feedback, which takes much longer and gains about the same in all types.
    """
    rows = some_rows(weight)
    plain = [pack_tensor(rows, FORMATS[kind], importance=moments.importance) for kind in kinds]
    return dict(zip(kinds, output_errors(rows, plain, moments), strict=True))


def gain_of_feedback(weight: torch.Tensor, moments: Moments, kind: str, loss: float) -> float:
    """What is left with error feedback of the loss without it."""
    rows = some_rows(weight)
    return output_errors(rows, [packed(rows, kind, moments)], moments)[0] / max(loss, TINY)


def some_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight[::-(-len(weight) // ROWS)].contiguous()


class Beside:
    """While entered, `change`, (N, K), is part of the weight of a linear layer, which is not touched."""

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

    def __init__(self, model, steps: Sequence[Step]):
        self.model, self.steps = model, steps
        self.dense = self._outputs()
        self.power = [float(output.square().sum()) for output in self.dense]

    def _outputs(self) -> list[torch.Tensor]:
        outputs = []
        for step in self.steps:
            stop_where_cancelled()
            outputs.append(step.run(self.model))
        return outputs

    def moved(self, layer: torch.nn.Module, weight: torch.Tensor, packed_weight: PackedTensor) -> float:
        """Power of the change of the model's output over that of the output, the mean of the steps."""
        with Beside(layer, packed_weight.dequantize() - weight):
            outputs = self._outputs()
        return sum(float((output - dense).square().sum()) / power
                   for output, dense, power in zip(outputs, self.dense, self.power, strict=True)) / len(self.steps)

    def of_layer(self, layer: torch.nn.Module, weight: torch.Tensor, moments: Moments,
                 every_type: bool) -> dict[str, float]:
        """Type -> cost of a layer: each type run, or one of them run and the others scaled by the layer's own loss."""
        kinds = types_for(tuple(weight.shape))
        if every_type:
            return {kind: self.moved(layer, weight, packed(weight, kind, moments)) for kind in kinds}
        losses, kind = own_losses(weight, moments, kinds), run_type(tuple(weight.shape))
        moved = self.moved(layer, weight, packed(weight, kind, moments))
        return {other: moved * loss / max(losses[kind], TINY) for other, loss in losses.items()}


def costs_of(layers: Mapping[str, torch.nn.Module], moments: Callable[[str], Moments | None],
             known: dict[str, dict[str, float]], weight_of: Callable[[torch.nn.Module], torch.Tensor], costs: Costs | None,
             every_type: bool, done: Callable[[], None]):
    """Fill `known`, name -> type -> cost, by the layers that are not in it yet; `done` is called after each.

    costs: None for no run of the model: a layer's own relative loss is its cost.
    """
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        if name in known or moments(name) is None or not types_for(shape):
            done()
            continue
        stop_where_cancelled()
        weight = weight_of(layer)
        known[name] = losses_of_layer(weight, moments(name)) if costs is None else \
            costs.of_layer(layer, weight, moments(name), every_type)
        done()


def losses_of_layer(weight: torch.Tensor, moments: Moments) -> dict[str, float]:
    """Costs without a run of the model: a layer's own relative losses, with error feedback."""
    shape = tuple(weight.shape)
    losses, kind = own_losses(weight, moments, types_for(shape)), run_type(shape)
    gain = gain_of_feedback(weight, moments, kind, losses[kind])
    return {kind: gain * loss for kind, loss in losses.items()}
