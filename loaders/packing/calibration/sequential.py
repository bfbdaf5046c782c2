"""Packing layer after layer, each so that it makes up for the errors of those before it.

For each layer the model runs twice on calls that were recorded before: as it is, and with what is
packed so far. The layer is then packed for the inputs that it has in the second run, towards the
outputs of the first (`ops.quantize.damped.Damped.target`). That takes two runs up to the layer for
each call, so with N layers about N runs of the model for each call recorded.

Nothing of the model is exchanged: what a packed layer would give takes the place of what the layer
gave.
"""
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ....ops import product
from ....ops.packed_tensor import PackedTensor
from ....ops.quantize.second_moments import SecondMoments
from .moment_collector import SMALL, block_for, linear_layers
from .sampling import SamplingRun, load, stop_where_cancelled

# that are recorded of a drawing, spread over pictures and noise levels: a few MB each in main
# memory
CALLS = 32
# bytes of the moments of one layer up to which their blocks are wider than they must be
MEMORY = 256 << 20
FREE = 2 << 30  # bytes that are kept free beside the model for them and for packing
# option of the host: weights are fetched ahead, which a run that ends early would leave
PREFETCHED = "prefetch_dynamic_vbars"


@dataclass
class Call:
    """What a module was called with, the tensors as copies on the CPU, and the device that they
    were on."""

    args: tuple
    kwargs: dict
    device: torch.device


class _StopForward(Exception):
    """Ends a run where all inputs that were asked for have been seen."""


@contextlib.contextmanager
def record_calls(module: torch.nn.Module,
                   wanted: Callable[[], bool] = lambda: True) -> Iterator[list[Call]]:
    """Inside this block, what `module` is called with goes into the list while `wanted` says so."""
    calls = []

    def record(module, args, kwargs):
        if wanted():
            device = next(part.device for part in args if isinstance(part, torch.Tensor))
            options = kwargs.get("transformer_options")
            if options:
                kwargs = kwargs | {
                    "transformer_options": {
                        key: value for key, value in options.items() if key != PREFETCHED
                    }
                }
            calls.append(Call(_copied_to(args, "cpu"), _copied_to(kwargs, "cpu"), device))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class SequentialCalibration:
    """The moments of one layer after another, with what is packed so far.

    module: runs on the device it is on, and is as it was whenever no method is at work. layers:
    name of its weight -> linear layer in it. calls: of `record_calls`, many enough to hold some
    out (8 or more).
    """

    def __init__(self, module: torch.nn.Module, layers: Mapping[str, torch.nn.Module],
                 calls: Sequence[Call]):
        self.module, self.layers, self.calls = module, layers, calls
        self.stages = _stages(module, layers, calls[0])
        self._packed: dict[str, tuple[PackedTensor, torch.Tensor | None]] = {}
        # a stage, and what its layers see
        self._latest: tuple[list[str], SecondMoments | None] = ([], None)

    @property
    def order(self) -> list[str]:
        """The names in the order in which the layers are to be packed; those that do not run are
        not among them."""
        return [name for stage in self.stages for name in stage]

    def moments(self, name: str) -> SecondMoments | None:
        """Moments, of a pair, of a layer's inputs with what is packed so far; None for layers that
        do not run.

        Layers that have the same input share them. Cancelled by the user, this raises what the host
        raises.
        """
        stage = next((stage for stage in self.stages if name in stage), None)
        if stage is None:
            return None
        if self._latest[0] is not stage:
            self._latest = stage, self._seen(self.layers[name])
        return self._latest[1]

    def set_packed(self, name: str, weight: PackedTensor, bias: torch.Tensor | None):
        """From now on a layer counts as packed. weight: (N, K), bias: (N,), on any device."""
        self._packed[name] = weight, bias

    def _seen(self, layer: torch.nn.Module) -> SecondMoments:
        device, columns = self.calls[0].device, layer.in_features
        moments = SecondMoments.zeros(columns, block_for([columns] * 2, MEMORY), device, pair=True)
        for call in self.calls:
            stop_where_cancelled()
            inputs = of_dense = _inputs(self.module, [layer], call)
            if self._packed:
                stop_where_cancelled()
                with contextlib.ExitStack() as undo:
                    for other, packed in self._packed.items():
                        undo.enter_context(_as_packed(self.layers[other], *packed))
                    inputs = _inputs(self.module, [layer], call)
            for (_, own), (_, dense) in zip(inputs, of_dense):
                moments.add(own, dense)
        return moments


def record_calibration(patcher, drawing: SamplingRun, count: int = CALLS,
            track: Callable[[Collection], Iterator] = iter) -> SequentialCalibration:
    """Draws with the host's ModelPatcher, which is left loaded, and records `count` calls. track:
    goes over the steps."""
    picked = {
        round((index + 0.5) * drawing.total / count - 0.5)
        for index in range(min(count, drawing.total))
    }
    steps, number = iter(track(range(drawing.total))), -1

    def seen(at: int, step):
        nonlocal number
        next(steps, None)
        number = at

    with record_calls(patcher.model.diffusion_model, lambda: number in picked) as calls:
        drawing.run(patcher, seen)
    for _ in steps:  # a sampler may take fewer
        pass
    load(patcher, FREE)
    return SequentialCalibration(patcher.model.diffusion_model, linear_layers(patcher.model), calls)


def _stages(module, layers: Mapping[str, torch.nn.Module], call: Call) -> list[list[str]]:
    """Names of the layers in the order in which they first run; those with the same input
    together."""
    names = {layer: name for name, layer in layers.items()}
    stages: list[list[str]] = []
    # shape -> the last input of that shape, and whose it was
    latest: dict[torch.Size, tuple[torch.Tensor, list[str]]] = {}
    seen = set()

    def see(layer, tensor):
        if layer in seen:
            return
        seen.add(layer)
        before, stage = latest.get(tensor.shape, (None, None))
        if before is not tensor and (
            before is None or tensor.numel() > SMALL or not torch.equal(before, tensor)
        ):
            stage = []
            stages.append(stage)
        stage.append(names[layer])
        latest[tensor.shape] = tensor, stage

    _watched(module, layers.values(), call, see)
    return stages


def _inputs(module, layers: Iterable[torch.nn.Module],
            call: Call) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """The layers, as they ran, and what entered each of them first. The run ends after the last."""
    inputs, waiting = [], set(layers)

    def see(layer, tensor):
        if layer in waiting:
            inputs.append((layer, tensor))
            waiting.discard(layer)
        if not waiting:
            raise _StopForward

    _watched(module, list(waiting), call, see)
    return inputs


@torch.inference_mode()
def _watched(module, layers: Iterable[torch.nn.Module], call: Call,
             see: Callable[[torch.nn.Module, torch.Tensor], None]):
    """Run a module; `see` gets each of the layers and its input before it runs, and may end the run
    with `_StopForward`."""
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: see(layer, args[0])) for layer in layers
    ]
    try:
        module(*_copied_to(call.args, call.device), **_copied_to(call.kwargs, call.device))
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _as_packed(layer: torch.nn.Module, weight: PackedTensor, bias: torch.Tensor | None):
    """Inside this block a linear layer gives what it would with these, which are on its device only
    while it runs."""

    def replace(layer, args, output):
        input = args[0].to(output.dtype)
        return product.linear(input, weight.to(input.device),
                              None if bias is None else bias.to(input))

    handle = layer.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _copied_to(value, device):
    """A copy of nested arguments with their tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if type(value) is dict:
        return {key: _copied_to(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied_to(part, device) for part in value)
    return value
