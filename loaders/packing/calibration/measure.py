"""Measures a model: its layers' inputs, and what packing each layer does to the model's output.

The model draws a little. Then some of its steps run again for each layer, with the layer's input
times the difference between its packed and its own weight added to the layer's output. The model's
weights are not replaced.
"""
import dataclasses
import time
from collections.abc import Mapping, Sequence

import torch
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from ....ops.log import log
from ....ops.packing.method_choice import output_errors
from ....ops.packing.pack_types import ROW_TYPES, TYPES
from ....ops.quantize.second_moments import SecondMoments
from ....ops.tensor.packed_tensor import PackedTensor
from ...progress import Progress
from ...refusals.foreign_weights import reject_foreign_weights
from ..planning.plan import types_for
from .moment_collector import Collector, dense_weight, linear_layers, shapes_of
from .sampling import SamplingRun, SamplingStep, load, random_conditioning, stop_where_cancelled
from .sensitivity import FAST, UNUSED, Sensitivity

# How costs are measured -> (steps that run again for each layer, whether they do for each type).
THOROUGHNESS = {
    "normal": (4, False), FAST: (0, False), "one run per layer and type": (4, True)
}
NORMAL, _, EACH_TYPE = THOROUGHNESS
CHOICES = (NORMAL, FAST)  # the third is understood, as older workflows have it

# Types for one run per layer, in blocks of 256 or 32: their error is well above rounding.
RUN_TYPES = ("Q3_K", "IQ4_NL")
SAMPLE_ROWS = 256  # of a weight, by which its error in each type is told: whole blocks of any type
TINY = 1e-30  # replaces an error of 0 in a division


@torch.no_grad()
def measure(patcher, sampling: SamplingRun, thoroughness: str = NORMAL) -> Sensitivity:
    """Draws pictures while it collects the moments of layers' inputs, then packs layer by layer.

    Args:
        patcher: the host's ModelPatcher; it and its model are restored, however this ends.
        sampling: how pictures are drawn; without prompts, random conditioning takes their place.
        thoroughness: a key of THOROUGHNESS.

    Raises:
        WeightFileError: where the model needs a prompt, or only another pack can read its weights.
    """
    reject_foreign_weights(patcher.model)
    layers = linear_layers(patcher.model)
    count, every_type = THOROUGHNESS[thoroughness]
    if not sampling.prompts:
        prompts = random_conditioning(patcher, sampling, sampling.samples)
        sampling = dataclasses.replace(sampling, prompts=prompts)
    progress = Progress("generating", "measuring the layers")
    ticks = iter(progress.track(range(sampling.total)))
    steps: list[SamplingStep] = []
    # of the steps that run again, spread over pictures and noise levels
    order = torch.randperm(sampling.total, generator=torch.Generator().manual_seed(sampling.seed))
    chosen = set(order[:count].tolist())

    started = 0.0

    def on_step(number: int, step: SamplingStep):
        nonlocal started
        next(ticks, None)
        if number == 1:  # the first step has loaded the model too
            started = time.monotonic()
        elif number == 2:
            progress.set_heading(time_text(
                time.monotonic() - started, sampling.total, count, layers, every_type))
            log.info("Measuring %s.", progress.heading)
        collector.next_step(number)
        if number in chosen:
            steps.append(step)

    with Collector(layers) as collector:
        sampling.run(patcher, on_step)
    for _ in ticks:  # a sampler may take fewer steps
        pass
    load(patcher)
    runs = Costs(patcher.model, steps, every_type) if count else None
    about = {"samples": sampling.samples, "steps": sampling.steps, "seed": sampling.seed,
             "cfg": sampling.cfg, "thoroughness": thoroughness}
    return measurement_of(patcher, collector, progress, about, runs)


def measurement_of(patcher, collector: Collector, progress: Progress, about: dict,
                   runs: "Costs | None" = None) -> Sensitivity:
    """Returns the measurement of a model from the moments of its layers' inputs.

    It is marked as unused where packing by it makes the layers' errors no smaller, in the mean over
    those with tokens held out.

    Args:
        patcher: the host's ModelPatcher.
        collector: of the moments.
        progress: the layers are its next stage.
        about: what was run, in words and numbers.
        runs: of the model, for the costs of layers; None: their own errors are the costs.
    """
    layers, costs = collector.layers, {}
    by_it = without = 0.0
    for name, layer in progress.track(list(layers.items())):
        moments = collector.moments_of(name)
        if moments is not None and types_for(tuple(layer.weight.shape)):
            stop_where_cancelled()
            weight = dense_weight(layer, patcher.load_device)
            errors = errors_of_layer(weight, moments)
            if moments.held_out_count:
                by_it, without = by_it + errors[0], without + errors[1]
            costs[name] = (runs.measure_layer(layer, weight, moments) if runs
                           else estimate_costs(weight, moments, errors[0]))
    shapes = {name: shape for name, shape in shapes_of(patcher.model).items() if name in layers}
    about = {"model": type(patcher.model).__name__, "columns_of_a_block": collector.block,
             UNUSED: by_it >= without} | about
    return Sensitivity(costs, shapes, about, _moments=collector.moments_of)


def time_text(seconds: float, steps: int, count: int, layers: Mapping[str, torch.nn.Linear],
              every_type: bool) -> str:
    """Returns how long a measurement takes, by the time of one call of the model.

    Args:
        seconds: of the call.
        steps: that generate.
        count, every_type: of THOROUGHNESS.
        layers: name -> layer, that are measured.
    """
    types = [types_for(tuple(layer.weight.shape)) for layer in layers.values()]
    calls = steps + count * (1 + sum(len(each) if every_type else bool(each) for each in types))
    return (f"takes about {tqdm.format_interval(calls * seconds)}: {calls} calls of the model,"
            f" {seconds:.2g} s each")


def usual_steps(matrices: int) -> int:
    """Returns the steps of a measurement of so many matrices as the node is set at first."""
    return SamplingRun.samples * SamplingRun.steps + THOROUGHNESS[NORMAL][0] * matrices


def run_type(types: Sequence[str]) -> str:
    """Returns the type for one run per layer among those of a matrix (`types_for`, not empty)."""
    return next(type_name for type_name in RUN_TYPES if type_name in types)


def weight_errors(weight: torch.Tensor, importance: torch.Tensor) -> dict[str, float]:
    """Returns type -> power of the error of some rows of a weight, of each type that it may take.

    The error of the layer's output is nearly proportional to it, in a weight that is packed with
    error feedback. Without, most of the output's error is what error feedback cancels, which says
    little of the rest.

    Args:
        weight: float32 (N, K).
        importance: of the layer's inputs (K,), by which GGUF types choose their scales.
    """
    rows, shape = sample_rows(weight), tuple(weight.shape)
    names = (*types_for(shape), "NF4",
             *(name for name, row_type in ROW_TYPES.items() if row_type.takes(shape)))
    packed = {name: TYPES[name].pack(rows, importance=importance) for name in names}
    return {name: float((tensor.dequantize() - rows).square().sum())
            for name, tensor in packed.items()}


def scale_costs(measured: dict[str, float], errors: dict[str, float]) -> dict[str, float]:
    """Returns type -> cost: those of types that were not measured follow from `weight_errors`.

    measured: type -> cost, of `run_type` and perhaps others.
    """
    known = run_type(list(measured))
    unit = measured[known] / max(errors[known], TINY)
    return {type_name: unit * error for type_name, error in errors.items()} | measured


def sample_rows(weight: torch.Tensor) -> torch.Tensor:
    """Returns SAMPLE_ROWS rows of a weight, evenly spaced, or all of a smaller one."""
    count = min(len(weight), SAMPLE_ROWS)
    return weight[torch.arange(count, device=weight.device) * len(weight) // count]


def add_delta(layer: torch.nn.Linear, change: torch.Tensor) -> RemovableHandle:
    """Adds `change`, (N, K), to the weight of a linear layer, by a forward hook.

    Returns:
        The handle of the hook, a context manager that removes it at the end.
    """

    def add(layer, inputs, output):
        delta = change.to(inputs[0].device, inputs[0].dtype)
        return output + torch.nn.functional.linear(inputs[0], delta).to(output.dtype)

    return layer.register_forward_hook(add)


class Costs:
    """Measures what the errors of layers do to the model's output.

    model: the host's BaseModel, loaded. steps: run again for each layer. every_type: True runs them
    for every GGUF type; False for one, whose result the errors of the weight scale to the others.
    """

    def __init__(self, model, steps: Sequence[SamplingStep], every_type: bool = False):
        self.model = model
        self.steps = steps
        self.every_type = every_type
        self.dense = self._outputs()
        self.power = [float(output.square().sum()) for output in self.dense]

    def _outputs(self) -> list[torch.Tensor]:
        outputs = []
        for step in self.steps:
            stop_where_cancelled()
            outputs.append(step.run(self.model))
        return outputs

    def output_error(self, layer: torch.nn.Linear, weight: torch.Tensor,
                     packed_weight: PackedTensor) -> float:
        """Returns the power of the output's error over that of the output, the mean of the steps,
        where a layer's own weight, float32 (N, K), is packed."""
        with add_delta(layer, packed_weight.dequantize() - weight):
            outputs = self._outputs()
        return sum(
            float((output - dense).square().sum()) / power
            for output, dense, power in zip(outputs, self.dense, self.power, strict=True)
        ) / len(self.steps)

    def measure_layer(self, layer: torch.nn.Linear, weight: torch.Tensor,
                      moments: SecondMoments) -> dict[str, float]:
        """Returns type -> cost of a layer with a weight, float32 (N, K); moments: of its inputs."""
        types = types_for(tuple(weight.shape))
        measured = {
            type_name: self.output_error(layer, weight, TYPES[type_name].pack(weight, moments))
            for type_name in (types if self.every_type else [run_type(types)])
        }
        return scale_costs(measured, weight_errors(weight, moments.importance))


def errors_of_layer(weight: torch.Tensor, moments: SecondMoments) -> list[float]:
    """Returns the power of the error of a layer's output over the output's, in `run_type`: packed
    by the moments of its inputs, and without. Some rows of its weight, float32 (N, K), tell it."""
    rows, pack_type = sample_rows(weight), TYPES[run_type(types_for(tuple(weight.shape)))]
    return output_errors(rows, [pack_type.pack(rows, moments), pack_type.pack(rows)], moments)


def estimate_costs(weight: torch.Tensor, moments: SecondMoments, error: float) -> dict[str, float]:
    """Returns type -> cost of a weight, float32 (N, K), without runs of the model: the layer's own
    error with error feedback, which is the first of `errors_of_layer`."""
    measured = {run_type(types_for(tuple(weight.shape))): error}
    return scale_costs(measured, weight_errors(weight, moments.importance))
