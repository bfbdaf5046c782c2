"""Packing layer after layer: it makes up for the errors of the layers before, and the model is left
as it was."""
import pytest
import torch

from featherweight.loaders.packing.calibration.sequential import (
    SequentialCalibration,
    record_calls,
)
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.packing.pack_tensor import pack_tensor
from featherweight.ops.quantize.second_moments import SecondMoments

pytestmark = pytest.mark.usefixtures("small_models")
WIDTH = 256
TOKENS = 40


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.out, self.unused = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.out(torch.tanh(self.query(x)) * torch.sigmoid(self.key(x)))


class Model(torch.nn.Module):
    """Takes its input among other arguments, as a diffusion model does, and counts its runs."""
    runs = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x, time, context=None):
        self.runs += 1
        x = x + time.view(-1, 1, 1) + context["of"][0]
        for block in self.blocks:
            x = block(x)
        return x


def arguments(seed: int) -> tuple[tuple, dict]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, TOKENS, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -0.7
    return (x, torch.rand(2, generator=generator)), {"context": {"of": [torch.ones(1) / 9]}}


def calls_of(model: Model, count: int = 8):
    with record_calls(model) as calls:
        for seed in range(count):
            args, kwargs = arguments(seed)
            model(*args, **kwargs)
            args[0].zero_()  # samplers write into what they gave
    return calls


def formats_of(model: Model, name: str = "Q3_K"):
    return {name_: FORMATS[name] for name_, _ in model.named_parameters()}


def pack_in_sequence(model: Model, formats, calls, progress=lambda name: None):
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in formats}
    calibration, packed = SequentialCalibration(model, layers, calls), {}
    for name in calibration.order:
        progress(name)
        packed[name] = pack_tensor(layers[name].weight, formats[name],
                                   moments=calibration.moments(name))
        calibration.set_packed(name, packed[name], layers[name].bias)
    return packed


def error(model: Model, weights) -> float:
    """Squared error of the output for calls that nothing was fitted to, as a part of the output's
    square."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    calls = [arguments(seed) for seed in range(100, 104)]
    wanted = [model(*args, **kwargs) for args, kwargs in calls]
    model.load_state_dict(own | {name: weight.dequantize() for name, weight in weights.items()})
    found = [model(*args, **kwargs) for args, kwargs in calls]
    model.load_state_dict(own)
    off = sum(float((one - other).square().sum()) for one, other in zip(wanted, found))
    return off / sum(float(one.square().sum()) for one in wanted)


def packed_apart(model: Model, calls, formats):
    """Each layer for the inputs that it has in the dense model."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in formats}
    moments = {name: SecondMoments.zeros(WIDTH) for name in formats}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: moments[name].add(args[0]))
        for name, layer in layers.items()
    ]
    for call in calls:
        model(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    return {
        name: pack_tensor(layers[name].weight, fmt,
                          moments=moments[name] if moments[name].count else None)
        for name, fmt in formats.items()
    }


def test_the_output_is_nearer_than_with_each_layer_packed_apart():
    model = Model()
    calls, formats = calls_of(model), formats_of(model)
    in_sequence, apart = (
        pack_in_sequence(model, formats, calls),
        packed_apart(model, calls, formats),
    )
    assert error(model, in_sequence) < 0.9 * error(model, apart)


def test_calls_are_recorded_as_they_were_made():
    model = Model()
    calls = calls_of(model, 2)
    for seed, call in enumerate(calls):
        (x, time), _ = arguments(seed)
        assert torch.equal(call.args[0], x) and torch.equal(call.args[1], time)
        assert call.kwargs["context"]["of"][0].shape == (1,)
    model(*call.args, **call.kwargs)
    assert len(calls) == 2, "it went on recording"


def test_layers_with_one_input_share_its_runs_and_layers_that_do_not_run_are_not_packed():
    model = Model()
    calls, formats, reported = calls_of(model, 6), formats_of(model), []
    before = model.runs
    packed = pack_in_sequence(model, formats, calls, reported.append)
    stages = 2 * 2  # query and key together, then out; as the first are packed nothing else is
    assert model.runs - before == 1 + 6 * (1 + 2 * (stages - 1))
    assert reported == list(packed) == [f"blocks.{block}.{name}.weight" for block in range(2)
                                        for name in ("query", "key", "out")]
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in formats}
    assert SequentialCalibration(model, layers, calls).moments("blocks.0.unused.weight") is None


def test_small_inputs_of_equal_values_are_one_input_too():
    class Modulated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.shifts = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))
            self.mixes = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x, vector):
            for shift, mix in zip(self.shifts, self.mixes):
                x = x + mix(x * shift(torch.tanh(vector)))
            return x

    model = Modulated().requires_grad_(False)
    with record_calls(model) as calls:
        model(torch.randn(TOKENS, WIDTH), torch.randn(1, WIDTH))
    layers = {
        f"{name}.weight": layer for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    stages = SequentialCalibration(model, layers, calls).stages
    assert stages == [
        ["shifts.0.weight", "shifts.1.weight"],
        ["mixes.0.weight"],
        ["mixes.1.weight"],
    ]


@pytest.mark.parametrize("stop_at", [None, 0, 4])
def test_the_model_is_left_as_it_was_even_when_cancelled(stop_at):
    class Cancelled(Exception):
        pass

    def progress(name):
        nonlocal done
        if done == stop_at:
            raise Cancelled
        done += 1

    done = 0

    model = Model()
    layers = [layer for block in model.blocks for layer in block.children()]
    calls, weights = calls_of(model, 4), [layer.weight for layer in layers]
    values = [weight.clone() for weight in weights]
    args, kwargs = arguments(0)
    wanted = model(*args, **kwargs)
    if stop_at is None:
        pack_in_sequence(model, formats_of(model), calls)
    else:
        with pytest.raises(Cancelled):
            pack_in_sequence(model, formats_of(model), calls, progress=progress)
    assert all(layer.weight is weight for layer, weight in zip(layers, weights))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, values))
    assert torch.equal(model(*args, **kwargs), wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_on_the_way_keeps_its_weights():
    model = Model()
    calls = calls_of(model, 4)
    weight, last = model.blocks[0].query.weight, model.blocks[1]
    count = 0

    def fail(layer, args):
        nonlocal count
        count += 1
        if count > 5:
            raise RuntimeError("out of memory")

    last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pack_in_sequence(model, formats_of(model), calls)
    assert model.blocks[0].query.weight is weight
