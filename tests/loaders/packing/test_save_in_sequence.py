"""A model whose layers are packed in turn as it is saved: the file is nearer to it than with each
layer packed apart, and it is left as it was whatever ends it."""
import functools

import comfy.model_management
import pytest
import torch
from patched_models import (
    dense_flux,
    flux_inputs,
    hooks_in,
    lora_for,
    packed_flux,
    patched,
    relative,
    run,
    tiny_flux,
)
from saving import save

from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.packing.calibration import sequential
from featherweight.loaders.packing.calibration.moment_collector import (
    Collector,
    linear_layers,
    shapes_of,
)
from featherweight.loaders.packing.calibration.sampling import SamplingRun
from featherweight.loaders.packing.calibration.sequential import record_calibration
from featherweight.loaders.packing.layer_losses import LAYERS
from featherweight.loaders.packing.planning.plan import PlanError, types_for
from featherweight.loaders.packing.source import source_of_model
from featherweight.loaders.packing_rules import bits_per_value
from featherweight.ops.tensor.packed_layout import is_packed

pytestmark = pytest.mark.usefixtures("small_models")

WIDTH = 256  # of the small model's text
COUNT = 10  # calls
MODELS = {
    "packed": lambda: packed_flux("Q8_0"),
    "ordinary": lambda: dense_flux("Q8_0"),
    "cast as it runs": lambda: dense_flux("Q8_0", dtype=torch.float16),
    "packed with a LoRA": lambda: patched(packed_flux("Q8_0"), (lora_for(tiny_flux()), 1.0)),
    "ordinary with a LoRA": lambda: patched(dense_flux("Q8_0"), (lora_for(tiny_flux()), 1.0)),
    "ordinary with a LoRA, patched in place": lambda: in_place(MODELS["ordinary with a LoRA"]()),
}


def in_place(patcher):
    patcher.weight_inplace_update = True
    return patcher


def prompt(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[
        torch.randn(1, 5, WIDTH, generator=generator),
        {"pooled_output": torch.randn(1, 256, generator=generator)}
    ]]


def drawing() -> SamplingRun:
    return SamplingRun([prompt(1), prompt(2)], {"samples": torch.zeros(1, 16, 16, 16)}, samples=3,
                       steps=4)


class Apart:
    """What each layer sees of the model as it is, in place of a measurement's file."""

    loss_kind = LAYERS

    def __init__(self, model, costs=None):
        self.costs = costs
        with Collector(linear_layers(model.model)) as self.collector:
            drawing().run(model, lambda number, step: self.collector.next_step(number))
        self.moments = self.collector.moments_of

    def match(self, shapes):
        return self

    def notes(self, packed, is_for_size):
        return []


def calibration_of(model, **options):
    return functools.partial(record_calibration, model, drawing(), COUNT, **options)


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: (value.dequantize() if is_packed(value) else value).clone()
            for name, value in model.model.state_dict().items()}


def error_of(path, wanted) -> float:
    """Of calls that nothing was fitted to."""
    model = load_diffusion_model(str(path))
    return sum(relative(run(model, inputs), output) ** 2 for inputs, output in wanted)


def wanted_of(model) -> list:
    inputs = [
        flux_inputs() | {
            "x": torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)),
            "c_crossattn": prompt(seed)[0][0]
        } for seed in range(100, 110)  # single ones differ by up to a tenth
    ]
    return [(one, run(model, one)) for one in inputs]


@pytest.mark.parametrize("type_name", ["int8_convrot", "nvfp4"])
def test_comfyuis_own_types_are_nearer_with_a_measurement_and_in_turn(tmp_path, type_name):
    model = MODELS["packed"]()
    paths = [tmp_path / f"{name}.safetensors" for name in ("plain", "apart", "turned")]
    sensitivity = Apart(model)
    save(source_of_model(model), paths[0], type_name)
    save(source_of_model(model), paths[1], type_name, sensitivity=sensitivity)
    saved = save(source_of_model(model), paths[2], type_name, calibrate=calibration_of(model))
    assert list(saved.types.values()).count(type_name) > 8
    wanted = wanted_of(model)
    plain, apart, turned = (error_of(path, wanted) for path in paths)
    assert apart < 0.5 * plain and turned < 0.5 * plain


@pytest.mark.parametrize(
    "kind",
    [
        kind
        if "LoRA" in kind and kind != "ordinary with a LoRA"
        else pytest.param(kind, marks=pytest.mark.heavy)
        for kind in MODELS
    ],
)
def test_the_file_is_nearer_to_the_model_than_with_its_layers_packed_apart(kind, tmp_path):
    model = MODELS[kind]()
    apart, turned = (tmp_path / f"{name}.gguf" for name in ("apart", "turned"))
    sensitivity = Apart(model)
    comfy.model_management.unload_all_models()
    before = state_of(model)
    source = source_of_model(model)  # before the host loads the model with its patches
    saved = save(source, turned, "Q3_K", calibrate=calibration_of(model))
    assert hooks_in(model) == 0
    save(source_of_model(model), apart, "Q3_K", sensitivity=sensitivity)
    entries = [open_weights(path).entries for path in (turned, apart)]
    assert [entry.format for entry in entries[0].values()] == [
        entry.format for entry in entries[1].values()
    ]
    assert list(saved.types.values()).count("Q3_K") > 8
    wanted = wanted_of(model)
    assert error_of(turned, wanted) < 0.95 * error_of(apart, wanted)
    comfy.model_management.unload_all_models()
    after = state_of(model)
    assert before.keys() == after.keys() and all(
        torch.equal(value, after[name]) for name, value in before.items()
    )


@pytest.mark.parametrize("at", ["a step", "a layer", "a run"])
def test_a_cancel_leaves_the_model_as_it_was_and_no_file(at, monkeypatch, tmp_path):
    model, count = packed_flux("Q8_0"), 0
    wanted = wanted_of(model)

    def tracked(items, sizes=()):
        nonlocal count
        for item in items:
            count += 1
            if count == 5:
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            yield item

    def interrupted(*args):
        comfy.model_management.interrupt_current_processing()
        return replace_output(*args)

    replace_output = sequential._replace_output
    if at == "a run":
        monkeypatch.setattr(sequential, "_replace_output", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(source_of_model(model), tmp_path / "a.gguf", "Q3_K",
             track=tracked if at == "a layer" else None,
             calibrate=calibration_of(model, **{"track": tracked} if at == "a step" else {}))
    assert (
        hooks_in(model) == 0
        and not list(tmp_path.iterdir())
        and "model_function_wrapper" not in model.model_options
    )
    for inputs, output in wanted:
        assert torch.equal(run(model, inputs), output)


def test_a_plan_that_cannot_be_ends_it_before_anything_is_drawn(tmp_path):
    with pytest.raises(PlanError):
        save(source_of_model(packed_flux("Q8_0")), tmp_path / "a.gguf", 1000,
             calibrate=lambda: pytest.fail("it drew"))


def test_a_mix_for_a_size_is_packed_in_turn_too(tmp_path):
    model = packed_flux("Q8_0")
    costs = {
        name: {kind: 1 / bits_per_value(kind) ** 4 for kind in types_for(shape)}
        for name, shape in shapes_of(model.model).items() if name in linear_layers(model.model)
    }
    sensitivity = Apart(model, costs)
    turned, apart = (tmp_path / f"{name}.gguf" for name in ("turned", "apart"))
    made = [save(source_of_model(model), path, 2_500_000, sensitivity=sensitivity,
                 calibrate=calibrate)
            for path, calibrate in ((turned, calibration_of(model)), (apart, None))]
    assert (
        made[0].types == made[1].types
        and turned.stat().st_size == apart.stat().st_size <= 2_500_000
    )
    assert error_of(turned, wanted := wanted_of(model)) < error_of(apart, wanted)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.fake_gpus)])
def test_a_change_that_is_to_arrive_whole_does(tmp_path, device):
    model = patched(packed_flux("Q4_K"), (lora_for(tiny_flux(), size=0.01), 1.0))
    saved = save(source_of_model(model), tmp_path / "a.gguf", "Q4_K",
                 calibrate=calibration_of(model))
    assert model.model.diffusion_model.img_in.weight.device.type == device
    share = next(
        float(line.split("(strength 1): ")[1].split("%")[0]) for line in saved.notes
        if "strength 1" in line)
    assert 99 <= share <= 101
