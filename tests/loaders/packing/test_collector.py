"""What is collected of a model's inputs takes no more room than is given to it, on the device and
in the file."""
import functools

from devtools.measure import model_sizes

import pytest
import torch
from pack_api import SecondMoments

from featherweight.loaders.families import rules_for
from featherweight.loaders.packing.calibration import moment_collector
from featherweight.loaders.packing.calibration.moment_collector import (
    MEMORY,
    Collector,
    moment_bytes,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 300  # enough that no input is kept to be compared with the next


def layers_of(model: model_sizes.Model) -> dict[str, torch.nn.Module]:
    shapes = model.shapes()
    family = rules_for(shapes)
    return {
        name: torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
        for name, shape in shapes.items() if len(shape) == 2 and family.may_be_packed(name, shape)
    }


def run(layers: dict[str, torch.nn.Module], device="meta"):
    """Call every layer; the modulations are all given the same vector."""
    vector = functools.cache(lambda columns: torch.empty(1, columns, device=device))
    for name, layer in layers.items():
        columns = layer.in_features
        layer(vector(columns) if "mod" in name else torch.empty(1, TOKENS, columns, device=device))


def model_named(start: str) -> model_sizes.Model:
    return next(model for model in model_sizes.MODELS if model.name.startswith(start))


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free on the meta device, from which nothing can be fetched."""
    monkeypatch.setattr(SecondMoments, "merge", lambda self, other: None)
    return lambda nbytes: monkeypatch.setattr(moment_collector, "free_memory", lambda device: nbytes
                                              )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Flux.1 dev", (256, False)),
        ("Flux.2 Klein 4B", (512, False)),
        ("Wan 2.1 14B I2V", (256, True)),
    ],
)
def test_the_moments_of_a_large_model_take_two_gigabytes_of_the_device(name, expected, free):
    free(24e9)
    layers = layers_of(model_named(name))
    with Collector(layers) as moment_collector:
        run(layers)
    on_device = [
        moments for moments in moment_collector.moments.values()
        if moments.blocks.device.type == "meta"
    ]
    taken = sum(moments.blocks.nbytes + moments.sketch.nbytes for moments in on_device)
    assert (
        taken
        == sum(moment_bytes([moments.columns], moment_collector.block) for moments in on_device)
        <= MEMORY
        == 2e9
    )
    left = MEMORY - taken
    beyond = [
        moments for moments in moment_collector.moments.values()
        if moments.blocks.device.type == "cpu"
    ]
    assert all(moment_bytes([moments.columns], moment_collector.block) > left for moments in beyond)
    assert {layers[name].in_features for name in layers} == {
        moments.columns for moments in (*on_device, *beyond)
    }
    assert (moment_collector.block, bool(beyond)) == expected


def test_no_more_than_half_of_what_is_free_is_taken(free):
    layers = {f"{number}.weight": torch.nn.Linear(512, 8, device="meta") for number in range(6)}
    free(5 * moment_bytes([512], None))
    with Collector(layers) as moment_collector:
        for layer in layers.values():
            layer(torch.empty(1000, 512, device="meta"))
    assert [moments.blocks.device.type for moments in moment_collector.moments.values()] == [
        "meta"
    ] * 2 + ["cpu"] * 4


@pytest.mark.fake_gpus
def test_moments_that_lie_on_the_cpu_are_those_that_would_lie_on_the_device():
    layers = {f"{number}.weight": torch.nn.Linear(512, 8, device="cuda") for number in range(4)}
    memory = 5 * moment_bytes([512], 256) // 2
    inputs = torch.randn(20, 4, 3, 512, generator=torch.Generator().manual_seed(0)).cuda()
    collectors = Collector(layers, memory), Collector(layers)
    collectors[1].block = collectors[0].block
    with torch.no_grad(), collectors[0], collectors[1]:
        for number, step in enumerate(inputs):
            for moment_collector in collectors:
                moment_collector.next_step(number)
            for layer, given in zip(layers.values(), step):
                layer(given)
    bounded, free = (list(moment_collector.moments.values()) for moment_collector in collectors)
    assert [moments.blocks.device.type for moments in bounded] == ["cuda", "cuda", "cpu", "cpu"]
    assert {moments.blocks.device.type for moments in free} == {"cuda"}
    for here, there in zip(bounded, free, strict=True):
        assert (here.count, here.held_out_count) == (
            there.count,
            there.held_out_count,
        ) and here.held_out_count > 6
        torch.testing.assert_close(here.blocks.cpu(), there.blocks.cpu(), rtol=1e-4, atol=1e-3)
        power = [float(moments.sketch.square().sum()) for moments in (here, there)]
        assert power[0] == pytest.approx(power[1], rel=0.3)
