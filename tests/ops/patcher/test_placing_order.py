"""A model with a budget in whole runs: after the first step its layers lie where that step has
shown it to be best."""
import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch
from gpu_memory import copied_by, larger_flux, largest_layer, lies_on, sample
from patched_models import lora_for, patched
from patcher_models import load

from featherweight.loaders.models.placement import place, placed_text
from featherweight.ops.patcher.residency import PAGE, slots_are_in_order
from featherweight.ops.patcher.residency_order import layers_that_fit, residency_order

pytestmark = pytest.mark.usefixtures("gpu")
STATIC = pytest.mark.fake_gpus
DYNAMIC = pytest.mark.fake_gpus(dynamic=True)


@pytest.fixture(scope="module")
def model(request):
    """(a Flux, its values): of 15 MB, packed or the host's own, or packed and of more than a page,
    as the parameter says."""
    sizes = {
        "hidden": 512 if request.param == "larger" else 256, "double_blocks": 3, "single_blocks": 6
    }
    packed, values = larger_flux("Q8_0", **sizes)
    if request.param == "host":
        packed = comfy.sd.load_diffusion_model_state_dict(dict(values))
    yield packed, values
    comfy.model_management.unload_all_models()


def per_step(patcher) -> int:
    """Bytes copied to the device in each step of a run."""
    shorter = copied_by(sample, patcher, 1)
    return copied_by(sample, patcher, 2) - shorter


def newly_placed(patcher, budget: float):
    """A clone with a budget of bytes, whose next step is the first one."""
    placed = place(patcher, budget)
    placed.model.packed_residency.profile = None
    return placed


def on_device(params: dict) -> str:
    """The type of device on which a layer lies, from its entry in the host's list."""
    # a layer without weights takes no room
    return next((param.device.type for param in params.values()), "cuda")


@STATIC
@pytest.mark.parametrize("share", [pytest.param(0.75, marks=pytest.mark.heavy), 0.3])
@pytest.mark.parametrize(
    ("model", "with_loras"),
    [pytest.param("packed", False, marks=pytest.mark.heavy), ("packed", True), ("host", False)],
    indirect=["model"],
)
def test_layers_lie_as_the_first_step_asks_and_nothing_else_differs(model, with_loras, share, gpu):
    patcher, values = model
    if with_loras:
        # its products take long
        few = {name: value for name, value in values.items() if "img_attn" in name}
        patcher = patched(patcher, (lora_for(values, seed=1), 0.8),
                          (lora_for(few, "dora", seed=2), 0.5))
    expected = sample(patcher)
    budget = share * patcher.model_size()
    placed = newly_placed(patcher, budget)
    assert torch.equal(sample(placed), expected)
    size, first_step = placed.full_size(), placed.model.packed_residency.profile
    factors = placed.model.packed_patches.nbytes
    assert {first_step.runs(name) for *_, name, _, _ in placed._load_list()} == {2}
    kept = {name: size for *_, size, name, _, params in placed._load_list()
            if on_device(params) == "cuda"}
    ordered = residency_order(placed._load_list(), placed.placement.gpu_bytes, first_step)
    assert kept.keys() == layers_that_fit(ordered, sum(kept.values())) != layers_that_fit(
        residency_order(placed._load_list(), placed.placement.gpu_bytes, None), sum(kept.values()))
    assert factors <= lies_on(placed.model) == placed.loaded_size() <= max(budget, factors + 4096)
    assert copied_by(load, placed) == 0
    lies = placed.memory_report()
    assert 0 <= per_step(placed) - lies.copied_per_step < 20_000
    assert lies.copied_per_step == 2 * (size - lies.on_device)
    assert size - lies.on_device <= size + factors - budget + largest_layer(placed)


@DYNAMIC
@pytest.mark.parametrize("model", ["larger"], indirect=True)
@pytest.mark.parametrize("with_lora", [pytest.param(False, marks=pytest.mark.heavy), True])
def test_layers_have_their_places_in_dynamic_vram_as_the_first_step_asks(model, with_lora, gpu):
    patcher, values = model
    if with_lora:
        patcher = patched(patcher, (lora_for(values, seed=1), 0.8))
    expected, size = sample(patcher), patcher.full_size()
    placed = newly_placed(patcher, PAGE + patcher.model.model_loaded_weight_memory)
    assert torch.equal(sample(placed), expected)
    assert placed.model.packed_residency.profile is not None and slots_are_in_order(placed)
    assert placed._vbar_get().loaded_size() <= PAGE
    assert copied_by(load, placed) <= 1e5
    copied = placed.memory_report().copied_per_step
    assert abs(per_step(placed) - copied) < 1e5
    assert copied <= 2 * (size - PAGE + 2 * largest_layer(placed))


@STATIC
@pytest.mark.parametrize("model", ["packed"], indirect=True)
def test_layers_on_the_device_never_exceed_the_budget_while_they_change_places(model, gpu):
    patcher, _ = model
    placed = newly_placed(patcher, 0.5 * patcher.model_size())
    before, peaks = [], []

    def after_step(step, *_):
        if step == 0:
            gpu.reset()
            before.append((gpu.used(), lies_on(placed.model)))

    def begins(*_):
        if before:
            peaks.append(gpu.peak())

    hook = placed.model.diffusion_model.register_forward_pre_hook(begins)
    sample(placed, callback=after_step)
    hook.remove()
    used, lay = before[0]
    assert lies_on(placed.model) <= 0.5 * placed.full_size()
    assert peaks[0] <= used + max(0, lies_on(placed.model) - lay) + largest_layer(placed)


@STATIC
@pytest.mark.parametrize("model", ["packed"], indirect=True)
def test_a_step_that_was_cancelled_shows_nothing_and_the_only_one_of_a_run_does(model):
    patcher, _ = model
    placed = newly_placed(patcher, 0.5 * patcher.model_size())

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    module = placed.model.diffusion_model.single_blocks[3].linear1
    hook = module.register_forward_pre_hook(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(placed)
    hook.remove()
    assert placed.model.packed_residency.profile is None and not module._forward_hooks
    first = sample(placed, 1)
    step = placed.model.packed_residency.profile
    assert step.runs("diffusion_model.single_blocks.3.linear1") == 2 and not module._forward_hooks
    assert torch.equal(sample(placed, 1), first) and placed.model.packed_residency.profile is step


@STATIC
@pytest.mark.parametrize("model", ["packed"], indirect=True)
@pytest.mark.parametrize("part", [0.3, 5])
def test_what_others_take_of_the_device_in_the_first_run_is_not_taken_back(model, part):
    """part: of the model, in bytes that another program wants once the first step is done."""
    patcher, values = model
    patcher = patched(patcher, (lora_for(values, seed=1), 0.8))
    expected, size = sample(patcher), patcher.model_size()
    placed = newly_placed(patcher, 0.7 * size)
    left = []

    def take(step, *_):
        if step == 0:
            host = comfy.model_management
            host.free_memory(
                host.get_free_memory(placed.load_device) + part * size, placed.load_device)
        left.append(lies_on(placed.model))

    assert torch.equal(sample(placed, callback=take), expected)
    assert placed.model.packed_residency.profile is not None
    assert max(left) == left[0] < max(0.45, 1 - part) * size


@STATIC
@pytest.mark.parametrize("model", ["packed"], indirect=True)
def test_with_hooks_the_next_load_brings_layers_into_order(model, gpu):
    patcher, values = model
    lora = lora_for(values, seed=7)
    outputs = []
    for part in (2, 0.5):
        placed = newly_placed(patcher, part * patcher.model_size())
        hooks = comfy.hooks.create_hook_lora(lora, 0.8, 0.0)
        placed.register_all_hook_patches(
            hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
        outputs += [sample(placed, hooks=hooks), sample(placed)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert placed.model.packed_residency.is_in_order(placed) and copied_by(load, placed) == 0


@STATIC
@pytest.mark.parametrize("model", ["packed"], indirect=True)
def test_the_text_counts_what_a_step_copies_where_it_runs_the_model_twice(model):
    patcher, _ = model
    placed = newly_placed(patcher, 0.5 * patcher.model_size())
    load(placed)
    once = placed_text(placed)
    sample(placed)
    lies = placed.memory_report()
    assert f"{lies.copied_per_step / 1e6:.1f} MB copied per step" in placed_text(placed) != once
    assert lies.copied_per_step == 2 * lies.copied
