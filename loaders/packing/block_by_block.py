"""Packing layer after layer, each so that it makes up for the errors of those before it.

For each layer the model runs twice on calls that were recorded before: dense, and with what is packed so far. The layer is then
packed for the inputs that it has in the second run, towards the outputs of the first (`ops.packing.damped.Damped.target`). That
takes two runs up to the layer for each call, so with N layers about N runs of the model for each call recorded.
"""
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ...ops.format import Format
from ...ops.packed import PackedTensor
from ...ops.packing import pack_tensor
from ...ops.packing.moments import Moments
from ...ops.rows import dense


@dataclass
class Call:
    """What a module was called with, the tensors as copies on the CPU, and the device that they were on."""

    args: tuple
    kwargs: dict
    device: torch.device


class _Reached(Exception):
    """Ends a run where all inputs that were asked for have been seen."""


@contextlib.contextmanager
def recorded_calls(module: torch.nn.Module) -> Iterator[list[Call]]:
    """Inside this block, what `module` is called with goes into the list."""
    calls = []

    def record(module, args, kwargs):
        device = next(part.device for part in args if isinstance(part, torch.Tensor))
        calls.append(Call(_moved(args, "cpu"), _moved(kwargs, "cpu"), device))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def pack_in_turn(module: torch.nn.Module, formats: Mapping[str, type[Format]], calls: list[Call], block: int | None = None,
                 progress: Callable[[int, int, str], None] | None = None) -> dict[str, PackedTensor]:
    """Packs weights of linear layers in the order in which they run.

    module: runs on the device it is on, and is left as it was. formats: name of a weight in it -> its format. calls: of
    `recorded_calls`, many enough to hold some out (8 or more). block: columns of a block of moments, as in `Moments.of`.
    progress: called with the number packed, of how many, and the name of the weight; it may raise to cancel.
    Returns name -> weight; layers that no call uses are packed without moments.
    """
    layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in formats}
    packed = {}
    stages = _stages(module, layers, calls[0])
    for stage in [*stages, [name for name in layers if not any(name in stage for stage in stages)]]:
        moments = None
        for name in stage:
            if progress is not None:
                progress(len(packed), len(formats), name)
            if moments is None and stage in stages:
                before = [(layers[other], weight) for other, weight in packed.items()]
                moments = _moments(module, layers[name], before, calls, block)
            weight = dense(layers[name].weight.detach()).to(calls[0].device)
            packed[name] = pack_tensor(weight, formats[name], moments=moments)
    return packed


def _moments(module, layer, before, calls: list[Call], block) -> Moments:
    """Moments, of a pair, of a layer's inputs. before: the layers packed so far and their weights."""
    moments = Moments.of(layer.weight.shape[1], block, calls[0].device, pair=True)
    for call in calls:
        wanted = list(_inputs(module, [layer], call))
        with contextlib.ExitStack() as undo:
            for other, weight in before:
                undo.enter_context(_with_weight(other, weight))
            found = list(_inputs(module, [layer], call))
        for (_, own), (_, of_dense) in zip(found, wanted):
            moments.add(own, of_dense)
    return moments


def _stages(module, layers, call: Call) -> list[list[str]]:
    """Names of the layers in the order in which they first run; those that follow each other with the same input together."""
    names = {layer: name for name, layer in layers.items()}
    stages, latest = [], None
    for layer, tensor in _inputs(module, layers.values(), call, to_the_end=True):
        if names[layer] in (name for stage in stages for name in stage):
            continue
        if tensor is latest:
            stages[-1].append(names[layer])
        else:
            stages.append([names[layer]])
        latest = tensor
    return stages


@torch.inference_mode()
def _inputs(module, layers: Iterable[torch.nn.Module], call: Call, to_the_end: bool = False):
    """The layers that ran and what entered them. Without `to_the_end` the run ends after the last layer's first input."""
    found, waiting = [], set(layers)

    def see(layer, args):
        found.append((layer, args[0]))
        waiting.discard(layer)
        if not waiting and not to_the_end:
            raise _Reached

    handles = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        module(*_moved(call.args, call.device), **_moved(call.kwargs, call.device))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def _with_weight(layer: torch.nn.Module, weight: PackedTensor):
    """Inside this block the layer computes with the values of a packed weight, which are there only while it runs."""
    own = layer.weight

    def put(layer, args):
        layer._parameters["weight"] = torch.nn.Parameter(dense(weight).to(own.device, own.dtype), requires_grad=False)

    def take(layer, args, output):
        layer._parameters["weight"] = own

    handles = [layer.register_forward_pre_hook(put), layer.register_forward_hook(take, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        layer._parameters["weight"] = own


def _moved(value, device):
    """A copy of nested arguments with their tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if type(value) is dict:
        return {key: _moved(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(part, device) for part in value)
    return value
