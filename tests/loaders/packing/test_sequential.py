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
