"""The patcher keeps weights packed and exact through everything the host does to a patched
model."""
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from pack_api import QuantizedTensor
from patched_models import (
    FORMAT_NAMES,
    Ledger,
    dense_flux,
    flux_pair,
    forward,
    limit,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    relative,
    run,
)
from patcher_models import ON_A_CPU, each_format, everywhere, load

from featherweight.ops.patcher import PackedPatcher, applied_patches

# Two devices to the host, though tensors on both say "cpu": loading in part without a GPU.
LOAD, OFFLOAD = torch.device("cpu:0"), torch.device("cpu")
MLP = "diffusion_model.double_blocks.0.img_mlp.2.weight"

pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")


# --- switching while fully loaded ---


@each_format
def test_an_object_in_a_layers_place_gets_no_other_models_patches(models):
    """As packs that compile blocks or replace a layer have it."""
    lora = lora_for(models.values)

    def replaced(patcher, strength: float):
        patcher, old = patched(patcher, (lora, strength)), patcher.model.diffusion_model.img_in
        new = comfy.ops.manual_cast.Linear(old.in_features, old.out_features)
        for parameter in new.parameters():
            parameter.requires_grad_(False).copy_(torch.linspace(
                -0.05, 0.05, parameter.numel()).view(parameter.shape))
        patcher.add_object_patch("diffusion_model.img_in", new)
        return patcher

    outputs = []
    for model in models.pair:
        sequence = [patched(model, (lora, 1.0)), replaced(model, 1.0), replaced(model, 0.4),
                    patched(model, (lora, 0.4)), model]
        outputs.append([run(patcher) for patcher in sequence])
        comfy.model_management.unload_all_models()
        outputs[-1].append(run(model))
    for actual, expected in zip(*outputs):
        assert relative(actual, expected) < limit(models.format_name)


@everywhere
def test_a_switch_moves_and_copies_no_base_weight(models):
    packed, dense, uploads = models.packed, models.dense, models.uploads
    first, second = models.loras()
    dora = lora_for(models.values, "dora", seed=3)
    stacks = [((first, 1.0),), ((first, 0.5),), ((first, 0.5), (second, 0.7)),
              ((dora, 0.8), (first, 0.5)), ((second, 0.7),), ((first, 1.0),), ()]
    expected = [run(patched(dense, *stack)) for stack in stacks]
    patchers = [patched(packed, *stack) for stack in stacks]
    run(packed)
    if uploads is not None:  # each layer once
        assert len(uploads) == sum(hasattr(module, "_v") for module in packed.model.modules()) > 10
        uploads.clear()
    outputs = []
    with Ledger(packed) as ledger:
        for patcher in patchers:
            load(patcher)
            outputs.append(forward(patcher))
        load(packed)
    assert torch.equal(outputs.pop(), models.plain)
    assert all(map(models.is_right, outputs, expected))
    if uploads is None:
        assert (ledger.moves, ledger.copies, ledger.kept) == (0, 0, True)
    else:  # a layer whose bias is patched is uploaded
        mlp = packed.model.diffusion_model.double_blocks[0].img_mlp[0]
        assert not any(isinstance(module.weight, QuantizedTensor) and module is not mlp
                       for module in uploads)
    assert models.is_packed() and not any(layer.lora for layer in packed_layers(packed))


@each_format
def test_patch_and_unpatch_outside_of_model_management(models):
    first, second = models.loras()
    expected = run(patched(models.dense, (first, 1.0), (second, 0.5)))
    comfy.model_management.unload_all_models()
    patcher = patched(models.packed, (first, 1.0), (second, 0.5))
    patcher.patch_model(OFFLOAD)
    assert models.is_right(forward(patcher), expected)
    patcher.unpatch_model(OFFLOAD)
    assert torch.equal(forward(patcher), models.plain)


@each_format
def test_two_models_of_one_file_have_a_lora_each(models):
    one, other = packed_flux(models.format_name), packed_flux(models.format_name)
    loras = models.loras()
    expected = [run(patched(one, (lora, 0.7))) for lora in loras]
    patchers = [patched(model, (lora, 0.7)) for model, lora in zip((one, other), loras)]
    for _ in range(2):
        load(*patchers)
        for patcher, output in zip(patchers, expected):
            assert relative(forward(patcher), output) < 1e-6
    assert relative(*expected) > 0.05


# --- loading in part ---


def on_two_devices(patcher):
    patcher = patcher.clone()
    patcher.load_device, patcher.offload_device = LOAD, OFFLOAD
    return patcher


@pytest.mark.parametrize("budget", [0.3, 0.8])
@pytest.mark.parametrize("models", ["Q2_K", "IQ4_XS"], indirect=True)
def test_loaded_in_part_again_and_again_and_then_unloaded_in_part(models, budget):
    first, second = models.loras()
    stacks = ([(second, 0.8)], [(first, 1.0), (second, 0.5)], [(first, -0.7)])
    expected = [run(patched(models.dense, *stack)) for stack in stacks]
    patchers = [on_two_devices(patched(models.packed, *stack)) for stack in stacks]
    size, loaded = models.packed.model_size(), []
    for _ in range(3):
        for patcher, wanted in zip(patchers, expected):
            patcher.partially_load(LOAD, budget * size - patcher.loaded_size())  # as the host does
            assert models.is_right(forward(patcher), wanted)
            loaded.append(patcher.loaded_size())
    assert loaded[3:6] == loaded[6:]  # nothing drifts
    for part in (0.1, 0.3, 0.9):
        patcher.partially_unload(OFFLOAD, part * size)
        assert models.is_right(forward(patcher), wanted)
    assert models.is_packed()


@each_format
def test_a_loader_that_asks_for_each_weight_by_itself(models):
    """ComfyUI-MultiGPU's DisTorch2 distributes layers over devices without the host's `load`."""
    packed, (first, second) = models.packed, models.loras()
    comfy.model_management.unload_all_models()

    def load_each(patcher):
        patcher.patch_model(load_weights=False)
        for name, module in patcher.model.named_modules():
            for param, _ in module.named_parameters(recurse=False):
                if f"{name}.{param}" in patcher.patches:
                    patcher.patch_weight_to_device(f"{name}.{param}", device_to=LOAD)
                if f"{name}.{param}" in patcher.weight_wrapper_patches:
                    module.weight_function.extend(patcher.weight_wrapper_patches[f"{name}.{param}"])
            module.comfy_patched_weights = True
        patcher.model.current_weight_patches_uuid = patcher.patches_uuid
        patcher.model.device = LOAD

    for with_wrapper in (False, True):
        both = [patched(patcher, (first, 1.0), (second, 0.5)) for patcher in models.pair]
        if with_wrapper:
            both = [wrapped(patcher) for patcher in both]
        load_each(both[0])
        assert models.is_right(forward(both[0]), run(both[1])) and models.is_packed()
        assert packed.loaded_size() == packed.model.packed_patches.nbytes > 0
        comfy.model_management.unload_all_models()
        packed.detach()
        for module in packed.model.modules():
            if hasattr(module, "weight_function"):
                module.weight_function = []
        assert packed.loaded_size() == 0 and torch.equal(forward(packed), models.plain)


def test_what_a_loader_is_asked_for_reaches_it_by_name(monkeypatch):
    """ComfyUI-MultiGPU's `partially_load` has another parameter where the host's has
    `force_patch_weights`."""
    packed, _ = flux_pair("Q8_0")
    asked = []

    def partially_load(self, device_to, extra_memory=0, full_load=False, force_patch_weights=False,
                       **kwargs):
        asked.append((full_load, force_patch_weights))
        return 0

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "partially_load", partially_load)
    packed.partially_load(LOAD, 0, force_patch_weights=True)
    assert asked == [(False, True)]


# --- memory ---


@each_format
def test_factors_count_as_loaded_memory_and_are_freed(models):
    packed, (first, second) = models.packed, models.loras()
    bare = packed.model_size()
    run(packed)
    assert packed.loaded_size() == bare
    packed_names = {f"lora_unet_{name.replace('.', '_')}" for name, module in
                    packed.model.diffusion_model.named_modules() if module in packed_layers(packed)}
    lora = sum(tensor.nbytes for name, tensor in first.items()
               if name.endswith(".weight") and name.partition(".")[0] in packed_names)
    one, two = patched(packed, (first, 1.0)), patched(packed, (first, 1.0), (second, 0.5))
    assert one.model_size() == bare + lora and two.model_size() == bare + 2 * lora
    assert one.clone().model_size() == one.model_size() and packed.clone().model_size() == bare
    for _ in range(3):
        for patcher, size in ((one, bare + lora), (two, bare + 2 * lora), (packed, bare),
                              (two, bare + 2 * lora)):
            run(patcher)
            assert patcher.loaded_size() == patcher.model_size() == size
        comfy.model_management.unload_all_models()
        assert two.loaded_size() == 0 and not two.model.packed_patches.layers
        assert all(layer.lora is None for layer in packed_layers(packed))


@each_format
def test_a_lora_stored_in_another_dtype_is_counted_as_it_is_held(models):
    half = {name: tensor.half() for name, tensor in models.loras()[0].items()}
    run(half := patched(models.packed, (half, 1.0)))
    factors = half.model.packed_patches.nbytes
    assert half.loaded_size() == half.model_size() == models.packed.model_size() + factors


@pytest.mark.parametrize("models", ["Q4_K"], indirect=True)
def test_a_failed_load_leaves_no_patch_behind(models, monkeypatch):
    first, second = models.loras()
    run(patched(models.packed, (first, 1.0)))
    second = patched(models.packed, (second, 1.0))
    monkeypatch.setattr(applied_patches, "build_patches", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(second)
    monkeypatch.undo()
    assert torch.equal(forward(models.packed), models.plain) and models.packed.loaded_size() == 0
    assert second.patches.keys() >= {"diffusion_model.img_in.weight"}


# --- hooks ---


def lora_hook(lora, strength, keyframes=()):
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    group = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=strength)
    frames = None
    for strength, start in keyframes:
        frames, = CreateHookKeyframe().create_hook_keyframe(
            strength_mult=strength, start_percent=start, prev_hook_kf=frames)
    return SetHookKeyframes().set_hook_keyframes(group, frames)[0] if keyframes else group


def sample(patcher, positive_hooks=None, negative_hooks=None, steps=4):
    generator = torch.Generator().manual_seed(7)
    noise, latent = torch.randn(1, 16, 8, 8, generator=generator), torch.zeros(1, 16, 8, 8)
    conditions = []
    for hooks in (positive_hooks, negative_hooks):
        condition = [[torch.randn(1, 5, 256, generator=generator), {}]]
        conditions.append(comfy.hooks.set_hooks_for_conditioning(condition, hooks))
    return comfy.sample.sample(patcher, noise, steps, 2.0, "euler", "simple", *conditions, latent,
                               seed=1, disable_pbar=True)


@pytest.mark.parametrize(("partly", "mode", "models"), [
    pytest.param(partly, mode, name, id=f"{'partly' if partly else 'full'}-{mode.value}-{name}")
    for index, name in enumerate(ON_A_CPU) for partly in (False, True)
    for which, mode in enumerate(comfy.hooks.EnumHookMode)
    if not index or partly == which],  # every format in each mode, the first one in all ways
    indirect=["models"])
def test_lora_hooks_with_keyframes_through_the_sampler(monkeypatch, mode, partly, models):
    first, second = models.loras()
    other = lora_for(models.values, "dora", seed=3)

    def result(patcher):
        """Without hooks, with them, and without them again."""
        patcher = patched(patcher, (first, 0.5))
        if partly and isinstance(patcher, PackedPatcher):
            patcher = on_two_devices(patcher)
            load = type(patcher).partially_load
            monkeypatch.setattr(
                type(patcher), "partially_load", lambda self, device, extra=0, **kwargs: load(
                    self, device, 0.4 * self.model_size(), **kwargs))
        patcher.set_hook_mode(mode)
        before = sample(patcher)
        positive = lora_hook(second, 0.9, [(1.0, 0.0), (0.3, 0.4), (0.0, 0.8)])
        output = sample(patcher, positive.clone_and_combine(lora_hook(first, 0.4)),
                        lora_hook(other, 0.7, [(0.2, 0.0), (1.0, 0.5)]))
        assert not isinstance(patcher, PackedPatcher) or not patcher.hook_backup
        assert torch.equal(sample(patcher), before)  # what hooks did is undone
        return before, output

    (plain, actual), (without, expected) = map(result, models.pair)
    assert models.is_right(actual, expected, without, plain) and models.is_packed()
    assert relative(plain, without) < limit(models.format_name)


def test_a_reshaping_lora_in_a_hook_is_left_out(caplog):
    packed, _ = flux_pair("Q8_0")
    lora = {"lora_A.weight": torch.ones(4, 128), "lora_B.weight": torch.ones(256, 4),
            "reshape_weight": torch.tensor([256, 128])}
    lora = {f"diffusion_model.img_in.{name}": tensor for name, tensor in lora.items()}
    without = sample(packed)
    # the host batches hooked steps apart
    assert relative(sample(packed.clone(), lora_hook(lora, 1.0)), without) < 1e-6
    assert "left out of diffusion_model.img_in.weight" in caplog.text
    assert torch.equal(sample(packed), without)


@each_format
@pytest.mark.parametrize("other_is_packed", [False, True])
def test_a_model_as_a_lora_hook(models, other_is_packed):
    other = flux_pair("Q8_0", 1)[0 if other_is_packed else 1]
    weights = comfy.hooks.get_patch_weights_from_model(other)
    plain, without = map(sample, models.pair)
    assert relative(plain, without) < limit(models.format_name)
    actual, expected = (sample(patcher.clone(), comfy.hooks.create_hook_model_as_lora(
        weights, None, strength_model=0.3, strength_clip=0.0)) for patcher in models.pair)
    assert models.is_right(actual, expected, without, plain)


# --- merging, saving, wrappers ---


@each_format
@pytest.mark.parametrize(("base", "other"), [(0, 0), (0, 1), (1, 0)])  # 0: packed, 1: dense
def test_model_merges(models, base, other):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    lora = lora_for(models.values)

    def merged(base, other):
        model = patched(models.pair[base], (lora, 0.3))
        return ModelMergeSimple().merge(model, flux_pair("Q8_0", 1)[other], 0.7)[0]

    actual, expected = merged(base, other), merged(1, 1)
    without = models.without, (models.plain, models.without)[base]
    assert models.is_right(run(actual), run(expected), *without)
    after = [run(patched(patcher, (lora, 0.5))) for patcher in (actual, expected)]
    assert models.is_right(*after, *without)
    assert torch.equal(run(models.packed), models.plain) and models.is_packed()


@each_format
@pytest.mark.parametrize("loaded", [False, True])
def test_a_saved_model_is_dense_with_its_patches_in_it(models, tmp_path, loaded):
    first, second = models.loras()
    saved = []
    for index, model in enumerate(models.pair):
        model = patched(model, (first, 1.0), (second, 0.5))
        if loaded and not index:
            run(model)
        comfy.sd.save_checkpoint(str(tmp_path / f"{index}.safetensors"), model)
        saved.append(comfy.utils.load_torch_file(str(tmp_path / f"{index}.safetensors")))
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[1].items():
        torch.testing.assert_close(saved[0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert models.is_packed()


def wrapped(patcher):
    patcher = patcher.clone()
    patcher.add_weight_wrapper(MLP, lambda weight: weight.relu())
    return patcher


@everywhere
@pytest.mark.parametrize("wrapper_first", [False, True])
def test_a_weight_wrapper_sees_the_patched_weight(models, wrapper_first):
    first, second = models.loras()

    def build(patcher):
        stages = [lambda p: patched(p, (first, 1.0), (second, 0.4)), wrapped]
        for stage in reversed(stages) if wrapper_first else stages:
            patcher = stage(patcher)
        return patcher

    packed, expected = models.packed, run(build(models.dense))
    for _ in range(2):  # loaded, then switched to
        assert models.is_right(run(build(packed)), expected)
        assert torch.equal(run(packed), models.plain)
    if models.uploads is None:
        split = on_two_devices(build(packed))
        split.partially_load(LOAD, 0.3 * packed.model_size())
        assert models.is_right(forward(split), expected)
    assert models.is_packed()


# --- compute dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("models", [
    pytest.param(name, marks=() if name in ("Q4_K", "INT8") else pytest.mark.heavy)
    for name in FORMAT_NAMES], indirect=True)
def test_half_precision_is_as_good_as_the_hosts_dense_model(models, dtype):
    stack = [(lora, 0.5) for lora in models.loras()]
    exact, errors = run(patched(models.dense, *stack)), []
    for make in (packed_flux, dense_flux):
        patcher = patched(make(models.format_name, dtype=dtype), *stack)
        patcher.set_model_compute_dtype(dtype)
        errors.append(relative(run(patcher), exact))
    assert errors[0] < 1.1 * errors[1]
