"""Pack Model: whatever loaded a MODEL, its packed copy is what the loaders make of the file, and
the MODEL stays as it is."""
import copy
import functools
import threading
import types

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_torch_compile import TorchCompileModel
from families import FAMILIES, host_patcher, random_weights, relative_error, shrunken_detection
from families import run as run_family
from host_formats import HOST_FORMATS
from marked_flux import in_format, write
from pack_api import (
    EXACT,
    PackedLayer,
    WeightFileError,
    is_packed,
    load_diffusion_model,
    load_notes,
    packed_tensors,
    source_of_model,
)
from patched_models import (
    LIMIT,
    error_by_effect,
    forward,
    lora_for,
    packed_flux,
    packed_layers,
    patched,
    relative,
    run,
    tiny_flux,
)
from safetensors.torch import save_file

from featherweight.loaders.models import fit_device, pack_on_load
from featherweight.loaders.models.fit_device import FIT, fit_text
from featherweight.loaders.models.pack_model import pack_model
from featherweight.loaders.models.placement import place
from featherweight.loaders.packing.planning import for_device
from featherweight.loaders.packing.planning.for_device import Memory
from featherweight.ops.layers import fast_by_kitchen
from featherweight.ops.tensor.packed_layout import plain_dtype_of

pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    save_file({name: value.bfloat16() for name, value in tiny_flux().items()}, path)
    return str(path)


class OddPatcher(comfy.model_patcher.ModelPatcher):
    """As of another pack."""


def by_another_pack(path: str):
    """A loader that sets what it likes on the model."""
    patcher = comfy.sd.load_diffusion_model(path)
    patcher.__class__ = OddPatcher
    network = patcher.model.diffusion_model
    network.by_name = {"first": network.img_in, "scale": 1.0}

    def forward(self, *args, **kwargs):
        assert self.by_name["first"] is self.img_in
        return type(self).forward(self, *args, **kwargs) * self.by_name["scale"]

    network.forward = types.MethodType(forward, network)
    return patcher


def merged(path: str):
    patcher = comfy.sd.load_diffusion_model(path)
    other = comfy.sd.load_diffusion_model_state_dict(
        {name: value + 0.01 * value.std() for name, value in tiny_flux(1).items()})
    return ModelMergeSimple().merge(patcher, other, 0.7)[0]


def of_a_checkpoint(path: str):
    checkpoint = path.replace("flux.", "checkpoint.")
    save_file({f"model.diffusion_model.{name}": value
               for name, value in comfy.utils.load_torch_file(path).items()}, checkpoint)
    return comfy.sd.load_checkpoint_guess_config(checkpoint, output_vae=False,
                                                 output_clip=False)[0]


LOADERS = {
    "Load Diffusion Model of ComfyUI": comfy.sd.load_diffusion_model,
    "Load Checkpoint of ComfyUI": of_a_checkpoint,
    "Load Diffusion Model of this pack": load_diffusion_model,
    "another pack": by_another_pack,
    "merged": merged,
}


def weights_of(patcher) -> dict[str, torch.Tensor]:
    return dict(patcher.model.diffusion_model.named_parameters())


def parts_of(patcher) -> dict[str, list[torch.Tensor]]:
    return {name: [part.cpu() for part in packed_tensors(weight)]
            for name, weight in weights_of(patcher).items() if is_packed(weight)}


def kept(patcher) -> dict[str, torch.Tensor]:
    """The values of all weights on the wire, with whatever is in them."""
    return {name: weight.patched(0, weight.rows).clone()
            for name, weight in source_of_model(patcher).weights.items() if weight.is_number}


def same(actual: dict, expected: dict) -> bool:
    return actual.keys() == expected.keys() and all(
        torch.equal(a, b) for name in expected
        for a, b in zip(actual[name], expected[name], strict=True))


def is_quantized(weight) -> bool:
    return is_packed(weight) and plain_dtype_of(weight) is None


@pytest.fixture
def counted(monkeypatch):
    """A list that gets the name of each weight that is packed."""
    names, pack = [], pack_on_load._Packer.pack
    monkeypatch.setattr(pack_on_load._Packer, "pack", lambda self, name, *rest: (
        names.append(name), pack(self, name, *rest))[1])
    return names


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("pack_to", ["Q4_K", "int8_convrot", 3_000_000])
def test_whatever_loaded_a_model_it_is_packed_as_its_file_would_be_and_stays_as_it_is(
        loader, pack_to, path):
    patcher = LOADERS[loader](path)
    before, values = run(patcher), kept(patcher)
    packed = pack_model(patcher, pack_to)
    assert len(parts_of(packed)) > 10
    if loader != "merged":
        loaded = load_diffusion_model(path, pack_to=pack_to, host_formats=EXACT)
        assert same(parts_of(packed), parts_of(loaded))
        assert torch.equal(run(packed), run(loaded))
    assert relative(run(packed), before) < 0.2
    assert packed.model is not patcher.model and not packed.patches
    assert all(not is_packed(weight) for weight in weights_of(patcher).values())
    assert same(kept(patcher), values) and torch.equal(run(patcher), before)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.latent])
def test_the_model_of_each_family_is_packed(name, monkeypatch):
    family = FAMILIES[name]
    shrunken_detection(family, monkeypatch)
    patcher = host_patcher(random_weights(family), family)
    before = run_family(patcher, family)
    packed = pack_model(patcher, "Q8_0")
    assert parts_of(packed)
    assert relative_error(run_family(packed, family), before) < 0.05
    assert torch.equal(run_family(patcher, family), before)


@pytest.mark.parametrize("source", HOST_FORMATS)
def test_weights_in_comfyuis_formats_are_packed_by_their_values(source, tmp_path):
    stored, marks, values = in_format(tiny_flux(), ".linear", source)
    patcher = comfy.sd.load_diffusion_model(
        write(tmp_path / "flux.safetensors", stored, marks=marks))
    packed = pack_model(patcher, "Q8_0")
    for name, weight in weights_of(packed).items():
        if is_packed(weight):
            assert relative(weight.dequantize().float().cpu(), values[name].float()) < 0.01, name
    assert all(isinstance(layer, PackedLayer) for layer in packed.model.modules()
               if is_packed(getattr(layer, "weight", None)))
    assert run(packed).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float8_e4m3fn}])
def test_weights_that_their_loader_has_rounded_to_8_bits_and_that_stay_are_told(path, options):
    model = comfy.sd.load_diffusion_model(path, model_options=options)
    notes = " ".join(load_notes(pack_model(model, "Q8_0")))
    assert ("stay in 8 bits, to which their loader has rounded them" in notes) == bool(options)


def test_packed_weights_stay_as_they_are_and_share_their_memory(counted):
    patcher = packed_flux("Q4_K")
    before = run(patcher)
    packed = pack_model(patcher, 10_000_000)
    held, was_held = parts_of(packed), parts_of(patcher)
    assert was_held and same({name: held[name] for name in was_held}, was_held) and not counted
    assert all(part.data_ptr() == own.data_ptr() for name in was_held for part, own in zip(
        packed_tensors(weights_of(packed)[name]), packed_tensors(weights_of(patcher)[name])))
    assert relative(run(packed), before) < 0.001


def test_loras_stay_patches_and_keep_their_full_effect(path):
    lora = lora_for(tiny_flux())
    patcher = comfy.sd.load_diffusion_model(path)
    exact = pack_model(patcher, "Q4_K")
    dense = comfy.sd.load_diffusion_model_state_dict(
        {name: weight.dequantize().float() if is_packed(weight) else weight.detach().clone()
         for name, weight in weights_of(exact).items()})
    packed = pack_model(patched(patcher, (lora, 0.8)), "Q4_K")
    assert error_by_effect(run(packed), run(patched(dense, (lora, 0.8))), run(dense),
                           run(exact)) < LIMIT
    assert torch.equal(run(packed), run(patched(exact, (lora, 0.8))))


@pytest.mark.parametrize("pack_to", ["Q8_0", "int8_convrot"])
def test_loras_are_rounded_into_the_weights_where_that_is_asked_for(pack_to, path):
    patcher = patched(comfy.sd.load_diffusion_model(path), (lora_for(tiny_flux(), "dora"), 0.8))
    before, values = run(patcher), kept(patcher)
    packed = pack_model(patcher, pack_to, round_loras=True)
    assert not packed.patches and patcher.patches
    for name, weight in weights_of(packed).items():
        dense = weight.dequantize() if is_packed(weight) else weight
        assert relative(dense.detach().float().cpu(), values[name]) < 0.02, name
    assert relative(run(packed), before) < 0.05
    assert torch.equal(run(patcher), before)


def test_a_merge_is_rounded_in_and_a_lora_behind_it_stays_a_patch(path):
    lora = lora_for(tiny_flux())
    patcher = patched(merged(path), (lora, 0.8))
    packed = pack_model(patcher, "Q8_0")
    values = kept(merged(path))
    assert {len(patches) for patches in packed.patches.values()} == {1}
    for name, weight in weights_of(packed).items():
        dense = weight.dequantize() if is_packed(weight) else weight
        assert relative(dense.detach().float().cpu(), values[name]) < 0.02, name
    assert relative(run(packed), run(patcher)) < 0.05


def test_equal_inputs_pack_nothing_again(path, counted):
    patcher, lora = comfy.sd.load_diffusion_model(path), lora_for(tiny_flux())
    first = pack_model(patcher, "Q4_K")
    outputs, packed = [run(first)], len(counted)
    for strength in (0.5, 1.0):  # as where the user turns a LoRA before the node
        outputs.append(run(pack_model(patched(patcher, (lora, strength)), "Q4_K")))
    again = pack_model(patcher, "Q4_K")
    assert again.model is first.model and torch.equal(run(again), outputs[0])
    assert packed and len(counted) == packed
    assert pack_model(patcher, "Q5_K").model is not first.model and len(counted) == 2 * packed
    assert torch.equal(run(first), outputs[0])


def test_a_model_that_is_loaded_with_its_loras_is_packed_without_them(path):
    patcher, lora = comfy.sd.load_diffusion_model(path), lora_for(tiny_flux())
    expected = parts_of(pack_model(patcher, "Q4_K"))
    vars(patcher.model).pop("featherweight_copy")
    comfy.model_management.load_models_gpu([patched(patcher, (lora, 1.0))])
    assert same(parts_of(pack_model(patcher, "Q4_K")), expected)


def test_hooks_and_schedules_are_kept(path):
    patcher, lora = comfy.sd.load_diffusion_model(path), lora_for(tiny_flux())
    hooks = comfy.hooks.create_hook_lora(lora, 0.8, 0.0)
    clone = patcher.clone()
    clone.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {})
    packed = pack_model(clone, "Q8_0")
    without = run(packed)
    packed.patch_hooks(hooks)
    hooked = forward(packed)
    packed.patch_hooks(None)
    assert relative(hooked, without) > 0.02
    assert relative(hooked, run(patched(pack_model(patcher, "Q8_0"), (lora, 0.8)))) < 0.01
    assert torch.equal(run(packed), without)


def test_what_other_nodes_have_set_on_the_model_is_on_the_copy(path):
    patcher = by_another_pack(path)
    patcher.set_model_unet_function_wrapper(lambda apply, arguments: apply(
        arguments["input"], arguments["timestep"], **arguments["c"]))
    patcher.add_object_patch("diffusion_model.forward", types.MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs) * 2,
        patcher.model.diffusion_model))
    packed = pack_model(patcher, "Q8_0")
    assert packed.model_options["model_function_wrapper"] is (
        patcher.model_options["model_function_wrapper"])
    assert type(packed).__mro__[1] is not OddPatcher
    assert packed.object_patches["diffusion_model.forward"].__self__ is (
        packed.model.diffusion_model)
    network = packed.model.diffusion_model
    assert network.by_name["first"] is network.img_in
    assert relative(run(packed), run(patcher)) < 0.05


def test_a_packed_copy_can_be_placed_and_copied_to_another_device(path):
    packed = pack_model(comfy.sd.load_diffusion_model(path), "Q8_0")
    expected = run(packed)
    assert torch.equal(run(place(packed, 0.5 * packed.model_size(), [], lambda remark: None)),
                       expected)
    function, arguments = packed.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert again.model is not packed.model and not again.is_dynamic()
    assert torch.equal(run(again), expected)
    shared = {part.data_ptr() for layer in packed_layers(packed)
              for part in packed_tensors(layer.weight)}
    assert shared == {part.data_ptr() for layer in packed_layers(again)
                      for part in packed_tensors(layer.weight)}


def test_it_fits_the_device_as_the_loader_of_the_file_does(path):
    packed = pack_model(comfy.sd.load_diffusion_model(path), FIT)
    loaded = load_diffusion_model(path, pack_to=FIT)
    assert fit_text(packed) == fit_text(loaded) != ""
    assert parts_of(packed).keys() == parts_of(loaded).keys()


def test_what_a_copy_would_not_have_is_refused_by_name(path):
    patcher = comfy.sd.load_diffusion_model(path)
    wrapped = patcher.clone()
    wrapped.add_object_patch("diffusion_model",
                             torch.nn.Sequential(patcher.model.diffusion_model))
    with pytest.raises(WeightFileError, match="^Another node has wrapped diffusion_model of the"
                       " model, as torch.compile does, .* Put Pack Model .* before the node"):
        pack_model(wrapped, "Q8_0")
    injected = patcher.clone()
    injected.set_injections("bypass", [comfy.model_patcher.PatcherInjection(id, id)])
    with pytest.raises(WeightFileError, match="has bypass put into it while it runs"):
        pack_model(injected, "Q8_0")
    patcher.model.diffusion_model.lock = threading.Lock()
    with pytest.raises(WeightFileError, match="^flux: another node has put something into the model"
                       " that cannot be copied .*lock.*Put Pack Model"):
        pack_model(patcher, "Q8_0")
    with pytest.raises(WeightFileError, match="^flux: none of its weights can be packed"):
        odd = copy.copy(patcher)
        for layer in odd.model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.__class__ = torch.nn.Linear
        pack_model(odd, "Q8_0")


def test_the_same_merge_with_loras_rounded_in_and_then_not_is_packed_for_each(path, counted):
    patcher = patched(merged(path), (lora_for(tiny_flux()), 0.8))
    before = run(patcher)
    for round_loras in (False, True, False):
        counted.clear()
        packed = pack_model(patcher, "Q8_0", round_loras)
        assert counted and bool(packed.patches) != round_loras
        assert packed.patches_uuid != patcher.patches_uuid
        assert relative(run(packed), before) < 0.05
    counted.clear()
    again = pack_model(patched(patcher, (lora_for(tiny_flux(), seed=1), 0.5)), "Q8_0")
    assert not counted and again.model is packed.model and len(again.patches) == len(packed.patches)


def test_other_patches_of_the_model_that_is_merged_in_make_another_copy(path):
    patcher = comfy.sd.load_diffusion_model(path)
    other = comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in tiny_flux(1).items()})
    for strength in (0.2, 1.0, 0.6):
        both = ModelMergeSimple().merge(
            patcher, patched(other, (lora_for(tiny_flux(1)), strength)), 0.5)[0]
        assert relative(run(pack_model(both, "Q8_0")), run(both)) < 0.05


def test_a_model_that_runs_with_another_sampling_is_packed(path):
    patcher = comfy.sd.load_diffusion_model(path)
    sampling = copy.deepcopy(patcher.get_model_object("model_sampling"))
    patcher.add_object_patch("model_sampling", sampling)
    run(patcher)  # ComfyUI puts it into the model meanwhile
    packed = pack_model(patcher, "Q8_0")
    run(packed)
    assert packed.model.model_sampling is sampling
    assert relative(run(packed), run(patcher)) < 0.05


def functions_of(network) -> dict:
    """Name -> a function that computes with the modules that it was made with."""
    forward = network.forward
    return {"closure": lambda *args, **kwargs: forward(*args, **kwargs),
            "partial": functools.partial(forward)}


@pytest.mark.parametrize(("kind", "where"), [
    ("closure", "object patch"), ("closure", "model"), ("partial", "object patch")])
def test_a_function_that_would_compute_with_the_unpacked_model_is_refused(kind, where, path):
    patcher = comfy.sd.load_diffusion_model(path)
    network = patcher.model.diffusion_model
    function = functions_of(network)[kind]
    if where == "model":
        network.forward = function
    else:
        patcher.add_object_patch("diffusion_model.forward", function)
    with pytest.raises(WeightFileError, match=r"wrapped diffusion_model\.forward of the model"):
        pack_model(patcher, "Q8_0")


def test_a_compiled_model_is_refused(path):
    patcher = TorchCompileModel.execute(comfy.sd.load_diffusion_model(path), "inductor").args[0]
    with pytest.raises(WeightFileError, match="^Another node has wrapped .*torch_compile_kwargs"):
        pack_model(patcher, "Q8_0")


def test_a_copy_with_replaced_parts_is_cloned_for_another_lora(path):
    patcher = by_another_pack(path)
    patcher.add_object_patch("diffusion_model.forward", types.MethodType(
        lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs),
        patcher.model.diffusion_model))
    packed = pack_model(patcher, "Q8_0")
    behind = packed.clone()
    behind.add_object_patch("diffusion_model.img_in", torch.nn.Sequential(
        packed.get_model_object("diffusion_model.img_in"), torch.nn.Identity()))
    output = run(behind)
    again = pack_model(patched(patcher, (lora_for(tiny_flux()), 0.5)), "Q8_0")
    assert again.model is packed.model and relative(run(again), output) > 0.01


def in_layers_of_others(path: str):
    """A MODEL with linear layers that are not ComfyUI's, and the bytes of their weights."""
    patcher = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.bfloat16})
    nbytes = 0
    for name, layer in patcher.model.diffusion_model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".txt_" in name:
            layer.__class__ = torch.nn.Linear
            nbytes += layer.weight.nbytes
    return patcher, nbytes


def held_bytes(patcher) -> int:
    return sum(weight.nbytes for weight in weights_of(patcher).values())


def test_a_size_counts_what_is_in_layers_of_others(path):
    patcher, others = in_layers_of_others(path)
    asked = others + 2_000_000
    assert 0.8 * asked < held_bytes(pack_model(patcher, asked)) < 1.02 * asked
    with pytest.raises(WeightFileError, match="too small for this model"):
        pack_model(patcher, others)


@pytest.mark.parametrize("is_multiplied", [True, False])
def test_what_fits_a_device_counts_it_too(is_multiplied, path, monkeypatch):
    monkeypatch.setattr(for_device, "STEP", 1000)
    monkeypatch.setattr(fit_device, "packed_formats",
                        lambda *_: () if is_multiplied else (for_device.FAST_FORMAT,))
    monkeypatch.setattr(Memory, "of", classmethod(lambda cls, device: Memory(12)))
    patcher, others = in_layers_of_others(path)
    whole, types = held_bytes(patcher), set()
    for room in torch.linspace(others, whole, 9).long().tolist():
        monkeypatch.setattr(Memory, "for_model", lambda *_, room=room, **__: room)
        packed = pack_model(patcher, FIT)
        targets = packed.get_attachment(fit_device.FIT_KEY)
        types.add(targets.files[0])
        assert held_bytes(packed) <= 1.02 * room or "copied in each step" in targets.copying
    assert (for_device.FAST_TYPE in types) == is_multiplied


@pytest.mark.parametrize(("compute", "expected"), [
    ("exact", "exact"), ("automatic", "fast"), (None, "fast")])
def test_who_loaded_it_exactly_computes_the_copy_exactly(compute, expected, path, monkeypatch):
    monkeypatch.setattr(fast_by_kitchen, "runs", lambda *arguments: True)
    patcher = (comfy.sd.load_diffusion_model(path) if compute is None else load_diffusion_model(
        path, compute=compute, disable_dynamic=True))
    packed = pack_model(patcher, "int8_convrot")
    assert {layer.compute for layer in packed.model.modules()
            if isinstance(layer, PackedLayer) and is_quantized(layer.weight)} == {expected}
