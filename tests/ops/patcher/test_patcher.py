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
from patched_models import (
    FORMAT_NAMES,
    LIMIT,
    Ledger,
    dense_flux,
    error_by_effect,
    flux_file,
    flux_pair,
    forward,
    limit,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    plain_outputs,
    relative,
    run,
)

from featherweight.ops.layers.packed_layers import PackedLayer
from featherweight.ops.patcher import PackedPatcher, applied_patches
from featherweight.ops.tensor.packed_layout import QuantizedTensor

# Two devices to the host, though tensors on both say "cpu": loading in part without a GPU.
LOAD, OFFLOAD = torch.device("cpu:0"), torch.device("cpu")


# packed layers; rows of one are shorter than a block
COUNTS = {"Q4_K": 18, "float8_e4m3fn": 19, "int8_tensorwise": 19, "asym_w4a8_int8 exact": 19}
# a format of ours, and some of the host's beside NF4: computed by the host in float, by its own
# product, and by us
both_kinds = pytest.mark.parametrize("format_name", COUNTS)

pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")


def loras(format_name="Q4_K"):
    """Two LoRAs for the packed matrices, the second also one for dense norms and biases."""
    values = flux_file(format_name)[1]
    first, second = lora_for(values, seed=1), lora_for(values, seed=2)
    for seed, (name, value) in enumerate(values.items()):
        if value.ndim == 1:
            generator = torch.Generator().manual_seed(seed)
            # as the host names norms
            layer, _, param = name.replace(".scale", ".weight").rpartition(".")
            suffix = "diff_b" if param == "bias" else "diff"
            second[f"diffusion_model.{layer}.{suffix}"] = (
                torch.randn(value.shape, generator=generator) * 0.1
            )
    return first, second


# --- switching while fully loaded ---


@both_kinds
def test_a_switch_moves_and_copies_no_base_weight(format_name):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    stacks = [((first, 1.0),), ((first, 0.5),), ((first, 0.5), (second, 0.7)), ((second, 0.7),),
              ((first, 1.0),)]
    patchers = [patched(packed, *stack) for stack in stacks]
    expected = [run(patched(dense, *stack)) for stack in stacks]
    plain, without = plain_outputs(packed, dense, format_name)
    run(packed)
    with Ledger(packed) as ledger:
        outputs = []
        for patcher in patchers:
            comfy.model_management.load_models_gpu([patcher])
            outputs.append(forward(patcher))
        comfy.model_management.load_models_gpu([packed])
    assert (ledger.moves, ledger.copies, ledger.kept) == (0, 0, True)
    for actual, wanted in zip(outputs, expected):
        assert error_by_effect(actual, wanted, without, plain) < limit(format_name)


@both_kinds
def test_patch_and_unpatch_outside_of_model_management(format_name):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    plain, without = plain_outputs(packed, dense, format_name)
    expected = run(patched(dense, (first, 1.0), (second, 0.5)))
    comfy.model_management.unload_all_models()
    patcher = patched(packed, (first, 1.0), (second, 0.5))
    patcher.patch_model(OFFLOAD)
    assert error_by_effect(forward(patcher), expected, without, plain) < limit(format_name)
    patcher.unpatch_model(OFFLOAD)
    assert torch.equal(forward(patcher), plain)


@both_kinds
def test_two_models_of_one_file_have_a_lora_each(format_name):
    first, second = loras(format_name)
    one, other = packed_flux(format_name), packed_flux(format_name)
    expected = [run(patched(one, (lora, 0.7))) for lora in (first, second)]
    patchers = [patched(one, (first, 0.7)), patched(other, (second, 0.7))]
    for _ in range(2):
        comfy.model_management.load_models_gpu(patchers)
        for patcher, output in zip(patchers, expected):
            assert relative(forward(patcher), output) < 1e-6
    assert relative(*expected) > 0.05


# --- loading in part ---


def on_two_devices(patcher):
    patcher = patcher.clone()
    patcher.load_device, patcher.offload_device = LOAD, OFFLOAD
    return patcher


@pytest.mark.parametrize("budget", [0.3, 0.8])
@pytest.mark.parametrize("format_name", ["Q2_K", "IQ4_XS"])
def test_loaded_in_part_again_and_again_and_then_unloaded_in_part(format_name, budget):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    stacks = ([(second, 0.8)], [(first, 1.0), (second, 0.5)], [(first, -0.7)])
    without, count = run(dense), len(packed_layers(packed))
    expected = [run(patched(dense, *stack)) for stack in stacks]
    patchers = [on_two_devices(patched(packed, *stack)) for stack in stacks]
    size, loaded = packed.model_size(), []
    for _ in range(3):
        for patcher, wanted in zip(patchers, expected):
            patcher.partially_load(LOAD, budget * size - patcher.loaded_size())  # as the host does
            assert error_by_effect(forward(patcher), wanted, without) < LIMIT
            loaded.append(patcher.loaded_size())
    assert loaded[3:6] == loaded[6:]  # nothing drifts
    for part in (0.1, 0.3, 0.9):
        patchers[2].partially_unload(OFFLOAD, part * size)
        assert error_by_effect(forward(patchers[2]), expected[2], without) < LIMIT
    assert len(packed_layers(packed)) == count


@both_kinds
def test_a_loader_that_asks_for_each_weight_by_itself(format_name):
    """ComfyUI-MultiGPU's DisTorch2 distributes layers over devices without the host's `load`."""
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    plain, without = plain_outputs(packed, dense, format_name)
    comfy.model_management.unload_all_models()

    def load(patcher):
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
        outputs = []
        for patcher in (packed, dense):
            patcher = patched(patcher, (first, 1.0), (second, 0.5))
            if with_wrapper:
                patcher.add_weight_wrapper("diffusion_model.double_blocks.0.img_mlp.2.weight",
                                           lambda weight: weight.relu())
            (load if patcher.model is packed.model else lambda patcher: run(patcher))(patcher)
            outputs.append(forward(patcher))
        assert error_by_effect(*outputs, without, plain) < limit(format_name)
        assert len(packed_layers(packed)) == COUNTS[format_name]
        assert packed.loaded_size() == packed.model.packed_patches.nbytes > 0
        comfy.model_management.unload_all_models()
        packed.detach()
        for module in packed.model.modules():
            if hasattr(module, "weight_function"):
                module.weight_function = []
        assert packed.loaded_size() == 0 and torch.equal(forward(packed), plain)


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


@both_kinds
def test_factors_count_as_loaded_memory_and_are_freed(format_name):
    packed, _ = flux_pair(format_name)
    first, second = loras(format_name)
    bare = packed.model_size()
    run(packed)
    assert packed.loaded_size() == bare
    lora = sum(t.nbytes for name, t in first.items()
               if name.endswith(".weight") and layer_is_packed(packed, name))
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


def layer_is_packed(patcher, name):
    layers = {
        f"lora_unet_{key.replace('.', '_')}"
        for key, module in patcher.model.diffusion_model.named_modules()
        if isinstance(module, PackedLayer) and isinstance(module.weight, QuantizedTensor)
    }
    return name.split(".")[0] in layers


@both_kinds
def test_a_lora_stored_in_another_dtype_is_counted_as_it_is_held(format_name):
    packed, _ = flux_pair(format_name)
    half = patched(packed, ({name: t.half() for name, t in loras(format_name)[0].items()}, 1.0))
    run(half)
    assert (
        half.loaded_size()
        == half.model_size()
        == packed.model_size() + half.model.packed_patches.nbytes
    )


def test_a_failed_load_leaves_no_patch_behind(monkeypatch):
    packed, dense = flux_pair("Q4_K")
    first, second = loras()
    without = run(dense)
    run(patched(packed, (first, 1.0)))
    second = patched(packed, (second, 1.0))
    monkeypatch.setattr(applied_patches, "build_patches", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(second)
    monkeypatch.undo()
    assert torch.equal(forward(packed), without) and packed.loaded_size() == 0
    assert second.patches.keys() >= {"diffusion_model.img_in.weight"}


# --- hooks ---


def hook_nodes():
    import comfy_extras.nodes_hooks as nodes

    return nodes


def lora_hook(lora, strength, keyframes):
    group = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=strength)
    if keyframes:
        frames = None
        for strength, start in keyframes:
            frames, = hook_nodes().CreateHookKeyframe().create_hook_keyframe(
                strength_mult=strength, start_percent=start, prev_hook_kf=frames)
        group, = hook_nodes().SetHookKeyframes().set_hook_keyframes(group, frames)
    return group


def sample(patcher, positive_hooks, negative_hooks=None, steps=4):
    generator = torch.Generator().manual_seed(7)
    noise, latent = torch.randn(1, 16, 8, 8, generator=generator), torch.zeros(1, 16, 8, 8)
    conditions = []
    for hooks in (positive_hooks, negative_hooks):
        condition = [[torch.randn(1, 5, 256, generator=generator), {}]]
        conditions.append(comfy.hooks.set_hooks_for_conditioning(condition, hooks))
    return comfy.sample.sample(patcher, noise, steps, 2.0, "euler", "simple", *conditions, latent,
                               seed=1, disable_pbar=True)


@pytest.mark.parametrize(("partly", "mode", "format_name"), [
    pytest.param(partly, mode, name, id=f"{'partly' if partly else 'full'}-{mode.value}-{name}")
    for index, name in enumerate(COUNTS) for partly in (False, True)
    for which, mode in enumerate(comfy.hooks.EnumHookMode)
    if not index or partly == which])  # every format in each mode, the first one in all ways
def test_lora_hooks_with_keyframes_through_the_sampler(monkeypatch, mode, partly, format_name):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    other = lora_for(flux_file(format_name)[1], "dora", seed=3)

    def result(patcher, hooked):
        patcher = patched(patcher, (first, 0.5))
        if partly and isinstance(patcher, PackedPatcher):
            patcher = on_two_devices(patcher)
            load = type(patcher).partially_load
            monkeypatch.setattr(
                type(patcher), "partially_load", lambda self, device, extra=0, **kwargs: load(
                    self, device, 0.4 * self.model_size(), **kwargs))
        patcher.set_hook_mode(mode)
        if not hooked:
            return sample(patcher, None)
        positive = lora_hook(second, 0.9, [(1.0, 0.0), (0.3, 0.4),
                                           (0.0, 0.8)]).clone_and_combine(lora_hook(first, 0.4, []))
        output = sample(patcher, positive, lora_hook(other, 0.7, [(0.2, 0.0), (1.0, 0.5)]))
        if isinstance(patcher, PackedPatcher):
            assert not patcher.hook_backup
        again = sample(patcher, None)  # what hooks did is undone
        return output, again

    without, plain = result(dense, False), result(packed, False)
    (expected, again), (actual, plain_again) = result(dense, True), result(packed, True)
    assert torch.equal(again, without) and torch.equal(plain_again, plain)
    assert error_by_effect(actual, expected, without, plain) < limit(format_name)
    assert relative(plain, without) < limit(format_name)
    assert len(packed_layers(packed)) == COUNTS[format_name]


def test_a_reshaping_lora_in_a_hook_is_left_out(caplog):
    packed, _ = flux_pair("Q8_0")
    lora = {"lora_A.weight": torch.ones(4, 128), "lora_B.weight": torch.ones(256, 4),
            "reshape_weight": torch.tensor([256, 128])}
    lora = {f"diffusion_model.img_in.{name}": tensor for name, tensor in lora.items()}
    without = sample(packed, None)
    # the host batches hooked steps apart
    assert relative(sample(packed.clone(), lora_hook(lora, 1.0, [])), without) < 1e-6
    assert "left out of diffusion_model.img_in.weight" in caplog.text
    assert torch.equal(sample(packed, None), without)


@both_kinds
@pytest.mark.parametrize("other_is_packed", [False, True])
def test_a_model_as_a_lora_hook(other_is_packed, format_name):
    packed, dense = flux_pair(format_name)
    other = flux_pair("Q8_0", 1)[0 if other_is_packed else 1]
    weights = comfy.hooks.get_patch_weights_from_model(other)
    plain, without = plain_outputs(packed, dense, format_name,
                                   lambda patcher: sample(patcher, None))
    results = []
    for patcher in (dense, packed):
        hook = comfy.hooks.create_hook_model_as_lora(weights, None, strength_model=0.3,
                                                     strength_clip=0.0)
        results.append(sample(patcher.clone(), hook))
    assert error_by_effect(results[1], results[0], without, plain) < limit(format_name)


# --- merging, saving, wrappers ---


@both_kinds
@pytest.mark.parametrize(
    ("base", "other"), [("packed", "packed"), ("packed", "dense"), ("dense", "packed")]
)
def test_model_merges(base, other, format_name):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    models = dict(zip(("packed", "dense"), flux_pair(format_name)))
    others = dict(zip(("packed", "dense"), flux_pair("Q8_0", 1)))
    lora = lora_for(flux_file(format_name)[1])
    plain, without = plain_outputs(*models.values(), format_name)
    expected = ModelMergeSimple().merge(patched(models["dense"], (lora, 0.3)), others["dense"],
                                        0.7)[0]
    merged = ModelMergeSimple().merge(patched(models[base], (lora, 0.3)), others[other], 0.7)[0]
    own = plain if base == "packed" else without
    assert error_by_effect(run(merged), run(expected), without, own) < limit(format_name)
    after = patched(merged, (lora, 0.5))
    expected = run(patched(expected, (lora, 0.5)))
    assert error_by_effect(run(after), expected, without, own) < limit(format_name)
    assert (
        torch.equal(run(models["packed"]), plain)
        and len(packed_layers(models["packed"])) == COUNTS[format_name]
    )


@both_kinds
@pytest.mark.parametrize("loaded", [False, True])
def test_a_saved_model_is_dense_with_its_patches_in_it(tmp_path, loaded, format_name):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    stack = (first, 1.0), (second, 0.5)
    saver = patched(packed, *stack)
    if loaded:
        run(saver)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), saver)
    comfy.sd.save_checkpoint(str(tmp_path / "dense.safetensors"), patched(dense, *stack))
    saved, reference = (comfy.utils.load_torch_file(str(tmp_path / f"{name}.safetensors"))
                        for name in ("saved", "dense"))
    assert saved.keys() == reference.keys()
    for name, value in reference.items():
        assert saved[name].dtype == value.dtype and torch.allclose(
            saved[name], value, rtol=1e-5, atol=1e-6
        ), name
    assert len(packed_layers(packed)) == COUNTS[format_name]


@both_kinds
@pytest.mark.parametrize("wrapper_first", [False, True])
def test_a_weight_wrapper_sees_the_patched_weight(wrapper_first, format_name):
    packed, dense = flux_pair(format_name)
    first, second = loras(format_name)
    key = "diffusion_model.double_blocks.0.img_mlp.2.weight"

    def build(patcher):
        stages = [lambda p: patched(p, (first, 1.0), (second, 0.4)), lambda p: add_wrapper(p, key)]
        for stage in reversed(stages) if wrapper_first else stages:
            patcher = stage(patcher)
        return patcher

    def add_wrapper(patcher, key):
        patcher = patcher.clone()
        patcher.add_weight_wrapper(key, lambda weight: weight.relu())
        return patcher

    plain, without = plain_outputs(packed, dense, format_name)
    expected = run(build(dense))
    for _ in range(2):  # loaded, then switched to
        assert error_by_effect(run(build(packed)), expected, without,
                               plain) < limit(format_name)
        assert torch.equal(run(packed), plain)
    split = on_two_devices(build(packed))
    split.partially_load(LOAD, 0.3 * packed.model_size())
    assert error_by_effect(forward(split), expected, without, plain) < limit(format_name)
    assert len(packed_layers(packed)) == COUNTS[format_name]


# --- compute dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format_name", [
    pytest.param(name, marks=() if name in ("Q4_K", "INT8") else pytest.mark.heavy)
    for name in FORMAT_NAMES])
def test_half_precision_is_as_good_as_the_hosts_dense_model(format_name, dtype):
    exact = run(patched(flux_pair(format_name)[1], *((lora, 0.5) for lora in loras(format_name))))
    errors = []
    for patcher in (packed_flux(format_name, dtype=dtype), dense_flux(format_name, dtype=dtype)):
        patcher = patched(patcher, *((lora, 0.5) for lora in loras(format_name)))
        patcher.set_model_compute_dtype(dtype)
        errors.append(relative(run(patcher), exact))
    assert errors[0] < 1.1 * errors[1]
