"""Sequential calibration: packs layer by layer, each to make up for the errors of those before it.

For each layer the model runs twice on recorded calls: as it is, and with the layers packed so far.
The layer is then packed for its inputs in the second run, towards its outputs in the first
(`ops.quantize.damped_hessian`). That is two runs up to the layer for each call, so about N runs of
the model for each call with N layers.

The model's weights are not replaced: the output of the packed layer replaces the layer's own.
"""
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from ....ops.layers import product
from ....ops.quantize.second_moments import SecondMoments
from ....ops.tensor.packed_tensor import PackedTensor
from .moment_collector import block_for, is_same, linear_layers
from .sampling import SamplingRun, load, stop_where_cancelled

# Calls that are recorded, spread over pictures and noise levels: a few MB each in main memory.
CALLS = 32
MEMORY = 256 << 20  # bytes for the moments of one layer, which allow wider blocks
FREE = 2 << 30  # bytes to keep free on the model's device, for moments and packing
# The host's option to fetch weights ahead, which a run that ends early would leave behind.
PREFETCHED = "prefetch_dynamic_vbars"


@dataclass
class Call:
    """The arguments of a module's call: tensors copied to the CPU, and the device they were on."""

    args: tuple
    kwargs: dict
    device: torch.device


class _StopForward(Exception):
    """Ends a run after the last layer of interest."""


@contextlib.contextmanager
def record_calls(module: torch.nn.Module,
                   is_recorded: Callable[[], bool] = lambda: True) -> Iterator[list[Call]]:
    """Inside this block, appends a call of `module` to the list where `is_recorded()` is true."""
    calls = []

    def record(module, args, kwargs):
        if is_recorded():
            device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
            options = kwargs.get("transformer_options")
            if options:
                kept = {key: value for key, value in options.items() if key != PREFETCHED}
                kwargs = kwargs | {"transformer_options": kept}
            calls.append(Call(_copy_to(args, "cpu"), _copy_to(kwargs, "cpu"), device))

    with module.register_forward_pre_hook(record, with_kwargs=True):
        yield calls


class SequentialCalibration:
    """Computes the moments of one layer after another, given the layers packed so far.

    module: runs on the device it is on; its layers have hooks only while a method runs. layers:
    name of the weight -> linear layer in it. calls: of `record_calls`, at least 8, so that some are
    held out.
    """

    def __init__(self, module: torch.nn.Module, layers: Mapping[str, torch.nn.Linear],
                 calls: Sequence[Call]):
        self.module = module
        self.layers = layers
        self.calls = calls
        self.stages = _find_stages(module, layers, calls[0])
        self._packed: dict[str, tuple[PackedTensor, torch.Tensor | None]] = {}
        # the latest stage and the moments that its layers share
        self._latest: tuple[list[str], SecondMoments | None] = ([], None)

    @property
    def order(self) -> list[str]:
        """The names in the order of packing, without layers that do not run."""
        return [name for stage in self.stages for name in stage]

    def moments(self, name: str) -> SecondMoments | None:
        """Returns the moments of a layer's inputs, paired with those of the dense model.

        Layers with the same input share them. None for a layer that does not run.

        Raises:
            InterruptProcessingException: the host's, once the user has cancelled.
        """
        stage = next((stage for stage in self.stages if name in stage), None)
        if stage is None:
            return None
        if self._latest[0] is not stage:
            self._latest = stage, self._collect_moments(self.layers[name])
        return self._latest[1]

    def set_packed(self, name: str, weight: PackedTensor, bias: torch.Tensor | None):
        """Counts a layer as packed from now on. weight: (N, K), bias: (N,), on any device."""
        self._packed[name] = weight, bias

    def _collect_moments(self, layer: torch.nn.Linear) -> SecondMoments:
        device, columns = self.calls[0].device, layer.in_features
        moments = SecondMoments.zeros(columns, block_for([columns] * 2, MEMORY), device, pair=True)
        for call in self.calls:
            stop_where_cancelled()
            dense = _first_input(self.module, layer, call)
            if dense is None:
                continue
            inputs = dense
            if self._packed:
                stop_where_cancelled()
                with contextlib.ExitStack() as hooks:
                    for name, (weight, bias) in self._packed.items():
                        hooks.enter_context(_replace_output(self.layers[name], weight, bias))
                    inputs = _first_input(self.module, layer, call)
            if inputs is not None:
                moments.add(inputs, dense)
        return moments


def record_calibration(patcher, sampling: SamplingRun, count: int = CALLS,
                       track: Callable[[Collection], Iterable] = iter) -> SequentialCalibration:
    """Draws pictures and records calls of the model.

    Args:
        patcher: the host's ModelPatcher, which stays loaded.
        sampling: how pictures are drawn.
        count: of the calls.
        track: iterates over the steps and reports progress.
    """
    picked = {
        round((index + 0.5) * sampling.total / count - 0.5)
        for index in range(min(count, sampling.total))
    }
    ticks = iter(track(range(sampling.total)))
    current = -1

    def on_step(number: int, step):
        nonlocal current
        next(ticks, None)
        current = number

    with record_calls(patcher.model.diffusion_model, lambda: current in picked) as calls:
        sampling.run(patcher, on_step)
    for _ in ticks:  # a sampler may take fewer steps
        pass
    load(patcher, FREE)
    return SequentialCalibration(patcher.model.diffusion_model, linear_layers(patcher.model), calls)


def _find_stages(module, layers: Mapping[str, torch.nn.Linear], call: Call) -> list[list[str]]:
    """Returns the names of layers with the same input together, in the order of their first run."""
    names = {layer: name for name, layer in layers.items()}
    stages: list[list[str]] = []
    # shape -> the latest input of that shape, and the stage of its layers
    latest: dict[torch.Size, tuple[torch.Tensor, list[str]]] = {}
    visited = set()

    def on_input(layer, tensor):
        if layer in visited:
            return
        visited.add(layer)
        stage = None
        if tensor.shape in latest:
            before, stage_before = latest[tensor.shape]
            if is_same(before, tensor):
                stage = stage_before
        if stage is None:
            stage = []
            stages.append(stage)
        stage.append(names[layer])
        latest[tensor.shape] = tensor, stage

    _run_with_inputs(module, layers.values(), call, on_input)
    return stages


def _first_input(module, layer: torch.nn.Linear, call: Call) -> torch.Tensor | None:
    """Runs a module up to a layer and returns the layer's input, None where the layer does not run.
    """
    inputs: list[torch.Tensor] = []

    def on_input(layer, tensor):
        inputs.append(tensor)
        raise _StopForward

    _run_with_inputs(module, [layer], call, on_input)
    return inputs[0] if inputs else None


@torch.inference_mode()
def _run_with_inputs(module, layers: Iterable[torch.nn.Linear], call: Call,
                     on_input: Callable[[torch.nn.Module, torch.Tensor], None]):
    """Runs a module; `on_input` gets each layer and its input before the layer runs.

    `on_input` may raise `_StopForward` to end the run.
    """
    with contextlib.ExitStack() as hooks, contextlib.suppress(_StopForward):
        for layer in layers:
            hooks.enter_context(
                layer.register_forward_pre_hook(lambda layer, args: on_input(layer, args[0])))
        module(*_copy_to(call.args, call.device), **_copy_to(call.kwargs, call.device))


def _replace_output(layer: torch.nn.Linear, weight: PackedTensor,
                    bias: torch.Tensor | None) -> RemovableHandle:
    """Makes a layer's output that of a packed weight, until the hook whose handle it returns ends.

    weight: (N, K), bias: (N,); they are on the layer's device only while it runs.
    """

    def replace(layer, args, output):
        input = args[0].to(output.dtype)
        packed = cast(PackedTensor, weight.to(input.device))
        return product.linear(input, packed, None if bias is None else bias.to(input))

    return layer.register_forward_hook(replace)


def _copy_to(value: Any, device: torch.device | str) -> Any:
    """Copies nested arguments, their tensors to `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if type(value) is dict:
        return {key: _copy_to(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_to(part, device) for part in value)
    return value
