"""A saved model is what was asked for, bit for bit what any reader gets, with everything on it that
was on the model."""
import functools
import math
import random
import re

import comfy.lora
import comfy.sd
import gguf
import numpy as np
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from families import (
    FAMILIES,
    host_patcher,
    random_weights,
    relative_error,
    shrunken_detection,
)
from families import run as run_family
from pack_api import (
    FORMATS,
    HOST_TYPES,
    KEEP_TYPES,
    SaveError,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    open_weights,
    pack_tensor,
    pack_types,
    plan_file,
    source_of_file,
    source_of_model,
)
from patched_models import (
    KINDS,
    dense_flux,
    flux_file,
    flux_pair,
    lora_for,
    packed_flux,
    patched,
    relative,
    run,
    tiny_flux,
)
from safetensors.torch import save_file
from saving import save

from featherweight.loaders.byte_sizes import size_text
from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.files import safetensors_writer
from featherweight.loaders.files.atomic_file import WriteError
from featherweight.loaders.packing import save as packing
from featherweight.loaders.packing.planning.file_plan import SAVE_TYPES
from featherweight.loaders.packing.planning.plan import DIGITS, PlanError
from featherweight.loaders.packing.save_report import Saved
from featherweight.loaders.packing.source import Source, check_saveable, unsaved_parts

pytestmark = pytest.mark.usefixtures("small_models")
BLOCK = "double_blocks.0.img_mlp.0.weight"  # a matrix that is packed
NORM = "double_blocks.0.img_attn.norm.query_norm.weight"


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Of a small Flux, in the host's names."""
    return {in_the_host(name): tensor for name, tensor in tiny_flux().items()}


def in_the_host(name: str) -> str:
    return name.replace("_norm.scale", "_norm.weight")


def named(folder, kind: str):
    """The path of a file of a type."""
    return folder / ("a.safetensors" if kind in safetensors_writer.PACKED_TYPES else "a.gguf")


@functools.cache
def dense_model():
    return comfy.sd.load_diffusion_model_state_dict(dict(weights()))


def values_in(path) -> dict[str, torch.Tensor]:
    """Name in the host -> float32 values of a file."""
    file = open_weights(path)
    found = as_tensors(file, read_marked(file))
    return {in_the_host(name): tensor.dequantize() if is_packed(tensor) else tensor.float()
            for name, tensor in found.items()}


def exact_values(patcher) -> dict[str, torch.Tensor]:
    """What the weights of a dense float32 model are with their patches, by the host."""
    weights = {
        name.removeprefix("diffusion_model."): (name, tensor)
        for name, tensor in patcher.model.state_dict().items()
        if name.startswith("diffusion_model.")
    }
    return {
        name: comfy.lora.calculate_weight(patcher.patches.get(key, []),
                                          tensor.detach().float().clone(), key)
        for name, (key, tensor) in weights.items()
    }


def in_the_hosts_names(file: tuple) -> dict[str, torch.Tensor]:
    return {in_the_host(name): tensor for name, tensor in file[1].items()}


def held(patcher) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("diffusion_model."): tensor
        for name, tensor in patcher.model.state_dict().items()
    }


# --- round trips ---

@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "NF4"])
def test_a_file_holds_what_packing_the_weight_gives_and_everything_else_as_the_plan_says(
        tmp_path, kind):
    path = named(tmp_path, kind)
    saved = save(source_of_model(dense_model()), path, kind)
    assert (
        isinstance(saved, Saved)
        and saved.nbytes == path.stat().st_size
        and saved.types[BLOCK] == kind
    )
    values = values_in(path)
    assert values.keys() == weights().keys()
    for name, weight in weights().items():
        expected = (
            pack_tensor(weight, FORMATS[kind]).dequantize()
            if saved.types[name] == kind
            else (weight if saved.types[name] == "F32" else weight.half().float())
        )
        assert torch.equal(values[name], expected), name
    assert relative(run(load_diffusion_model(str(path))), run(dense_model())) < 0.1


def test_gguf_py_reads_the_same_values_under_the_names_of_the_field(tmp_path):
    saved = save(source_of_model(dense_model()), tmp_path / "a.gguf", "Q4_K")
    reader = gguf.GGUFReader(saved.path)
    values = values_in(saved.path)
    for tensor in reader.tensors:
        name = in_the_host(tensor.name)
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(np.ravel(read), values[name].flatten().numpy()), name
    names = {tensor.name for tensor in reader.tensors}
    assert NORM.replace("weight", "scale") in names and not any(
        "query_norm.weight" in name for name in names
    )
    fields = {
        key: reader.get_field(key).contents()
        for key in ("general.architecture", "general.file_type", "general.name")
    }
    assert fields == {"general.architecture": "flux", "general.file_type": 14, "general.name": "a"}


@pytest.mark.parametrize("format_name", ["Q4_K", "IQ4_XS"])
def test_weights_without_a_patch_in_the_wanted_type_are_copied_bit_for_bit(
        tmp_path, format_name, monkeypatch):
    packed = packed_flux(format_name)
    monkeypatch.setattr(pack_types, "pack_tensor", None)
    save(source_of_model(packed), tmp_path / "a.gguf", format_name)
    found = open_weights(tmp_path / "a.gguf").state_dict()
    for name, tensor in held(packed).items():
        if is_packed(tensor):
            assert torch.equal(found[name]._qdata.view(-1), tensor._qdata.view(-1)), name
    save(source_of_model(packed), tmp_path / "b.gguf", KEEP_TYPES)
    assert torch.equal(run(load_diffusion_model(str(tmp_path / "b.gguf"))), run(packed))


def test_as_it_is_keeps_the_type_of_each_weight(tmp_path):
    saved = save(source_of_model(packed_flux("Q5_K")), tmp_path / "a.gguf", KEEP_TYPES)
    with_lora = patched(packed_flux("Q5_K"), (lora_for({BLOCK: weights()[BLOCK]}), 1.0))
    touched = save(source_of_model(with_lora), tmp_path / "b.gguf", KEEP_TYPES)
    assert saved.types[BLOCK] == "Q5_K" and touched.types == saved.types | {BLOCK: "Q6_K"}


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q4_1", "Q3_K"])
def test_a_mix_keeps_weights_that_are_packed_where_they_fit(name, tmp_path):
    size = save(source_of_model(dense_model()), tmp_path / "a.gguf", name).nbytes
    packed, stored = load_diffusion_model(str(tmp_path / "a.gguf")), values_in(tmp_path / "a.gguf")
    for share in (1, 1.1):
        saved = save(source_of_model(packed), tmp_path / f"{share}.gguf", int(size * share))
        assert saved.nbytes <= size * share
        found = values_in(saved.path)
        assert all(torch.equal(found[key], value) for key, value in stored.items())
    smaller = save(source_of_model(packed), tmp_path / "smaller.gguf", int(size * 0.9))
    assert smaller.nbytes <= size * 0.9


@pytest.mark.parametrize("size", [2_000_000, 2_600_000, 4_000_000])
def test_a_size_is_that_of_the_whole_file_and_never_exceeded(tmp_path, size):
    saved = save(source_of_model(dense_model()), tmp_path / "a.gguf", size)
    assert 0.96 * size < saved.nbytes <= size  # few matrices, so that no mix comes nearer
    with pytest.raises(PlanError, match="too small"):
        save(source_of_model(dense_model()), tmp_path / "b.gguf", 1_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("base", "metadata"), [(None, {}), (None, {"workflow": "x" * 300_000}), ("Q4_K", {})]
)
def test_the_size_that_a_refusal_names_can_be_asked_for(tmp_path, base, metadata):
    model = (
        dense_model()
        if base is None
        else patched(packed_flux(base), (lora_for(weights(), size=0.02), 1.0))
    )
    for asked in (100_000, 1_400_000):
        with pytest.raises(PlanError,
                           match=f"A size of {size_text(asked, DIGITS)} is too small") as refused:
            save(source_of_model(model), tmp_path / "a.gguf", asked, metadata=metadata)
        named = round(float(re.search(r"it takes ([\d.]+) MB", str(refused.value))[1]) * 1e6)
        assert ("with a LoRA on them take Q6_K" in str(refused.value)) == (base is not None)
        assert (
            save(
                source_of_model(model), tmp_path / "a.gguf", named, metadata=metadata,
                overwrite=True
            ).nbytes
            <= named
        )
        with pytest.raises(PlanError, match="too small"):
            save(source_of_model(model), tmp_path / "b.gguf", named - 20_000, metadata=metadata)


def test_a_size_is_not_exceeded_for_values_that_no_packed_type_holds(tmp_path):
    source = source_of_model(dense_model())
    source.weights[BLOCK].read = lambda start, stop: weights()[BLOCK][start:stop] * 1e-12
    with pytest.raises(
            SaveError, match=
            f"{BLOCK}' do not fit into .* in BF16 the file takes 2... MB, .* than 2.00 MB. Choose"):
        save(source, tmp_path / "a.gguf", 2_000_000)
    assert list(tmp_path.iterdir()) == []
    one_type = save(source, tmp_path / "a.gguf", "Q4_K")
    # Q8_0 has the steps for them
    source.weights[BLOCK].read = lambda start, stop: weights()[BLOCK][start:stop] * 3e-6
    small = save(source, tmp_path / "b.gguf", 2_000_000)
    assert one_type.types[BLOCK] == "BF16" and small.nbytes <= 2_000_000


@pytest.mark.fake_gpus
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("base", [None, "Q4_K"])
def test_a_model_on_a_gpu_gives_the_file_that_it_gives_on_the_cpu(tmp_path, base, with_lora):
    cpu = torch.device("cpu")
    values = []
    for options in ({"load_device": cpu, "offload_device": cpu}, {}):
        model = (
            comfy.sd.load_diffusion_model_state_dict(dict(weights()), model_options=options)
            if base is None
            else load_diffusion_model(flux_file(base)[0], model_options=options)
        )
        if with_lora:
            model = patched(model, (lora_for(weights(), size=0.02), 1.0))
        run(model)
        saved = save(source_of_model(model), tmp_path / f"{len(values)}.gguf", "Q8_0")
        values.append(values_in(saved.path))
    assert model.model.diffusion_model.img_in.weight.device == model.load_device != cpu
    on_cpu, on_gpu = values
    assert all(torch.equal(on_gpu[name], on_cpu[name]) for name in on_cpu)


# --- patches ---

@pytest.mark.parametrize("kind", KINDS)
def test_patches_of_every_kind_are_applied_in_float32_and_packed_once(tmp_path, kind):
    model = patched(dense_model(), (lora_for(weights(), kind, seed=3), 0.7),
                    (lora_for(weights(), "lora", seed=4), 0.2))
    saved = save(source_of_model(model), tmp_path / "a.gguf", "Q8_0")
    values, exact = values_in(saved.path), exact_values(model)
    for name, weight in exact.items():
        expected = (
            pack_tensor(weight, FORMATS["Q8_0"]).dequantize()
            if saved.types[name] == "Q8_0"
            else weight
        )
        assert relative(values[name], expected) < (
            1e-6 if saved.types[name] in ("Q8_0", "F32") else 0.005
        ), name


# the last: slices that begin inside of a LoRA's rows
@pytest.mark.parametrize("most", [1 << 24, 1 << 14, 320 * 256])
def test_rows_are_patched_and_packed_as_the_whole_weight_is(tmp_path, most, monkeypatch):
    layers = {"double_blocks.0.img_attn.qkv": (256 * 3, 256)}
    lora = {}  # in the names of diffusers, so that each is on some rows of the fused weight
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        torch.manual_seed(index)
        lora[f"transformer.transformer_blocks.0.attn.{part}.lora_A.weight"] = torch.randn(4, 256)
        lora[f"transformer.transformer_blocks.0.attn.{part}.lora_B.weight"] = (
            torch.randn(256, 4) * 0.01
        )
    model = patched(dense_model(), (lora, 1.0), (lora_for(weights(), seed=5), 0.5))
    assert len(model.patches[f"diffusion_model.{next(iter(layers))}.weight"]) == 4
    model = ModelMergeSimple().merge(model, packed_flux("Q4_K", seed=2), 0.6)[0]
    monkeypatch.setattr(packing, "SLICE_VALUES", most)
    saved = save(source_of_model(model), tmp_path / "a.gguf", "Q8_0")
    values = values_in(saved.path)
    exact = exact_values(model)
    for name in exact:
        packed = (
            pack_tensor(exact[name], FORMATS["Q8_0"]).dequantize()
            if saved.types[name] == "Q8_0"
            else exact[name]
        )
        assert relative(values[name], packed) < (
            1e-4 if saved.types[name] in ("Q8_0", "F32") else 0.005
        ), name
    slices = source_of_model(model).weights["single_blocks.0.linear1.weight"].slices(most)
    assert (
        len(slices) == (1 if most > 1 << 20 else -(-slices[-1][1] // slices[0][1]))
        and slices[-1][1] == 1792
    )


def shares(text: str) -> list[float]:
    return [
        float(line.split(": ")[1].split("%")[0]) for line in text.splitlines()
        if "of it is kept" in line
    ]


@pytest.mark.parametrize(
    ("base", "kind"),
    [(None, "Q8_0"), ("Q4_K", "Q4_K"), ("Q4_K", "Q8_0"), ("Q2_K", "Q3_K"), ("Q8_0", "Q4_K")],
)
def test_a_lora_on_a_dense_or_packed_base_keeps_at_least_99_percent_of_itself(tmp_path, base, kind):
    model = dense_model() if base is None else packed_flux(base)
    saved = save(source_of_model(patched(model, (lora_for(weights(), size=0.02), 1.0))),
                 tmp_path / "a.gguf", kind)
    assert (
        all(99 <= share <= 101 for share in shares(saved.text)) and len(shares(saved.text)) == 1
    ), saved.text
    assert saved.types[BLOCK] == ("Q6_K" if base in ("Q4_K", "Q2_K") and kind != "Q8_0" else kind)


@pytest.mark.parametrize("size", [
    0.02, *(pytest.param(size, marks=pytest.mark.heavy) for size in (0.005, 0.002)), 0.0005])
@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("Q8_0", "Q6_K"),
        ("Q6_K", "Q6_K"),
        ("Q8_0", KEEP_TYPES),
        ("Q4_K", "Q4_K"),
        ("BF16", KEEP_TYPES),
    ],
)
def test_a_weak_lora_that_is_to_arrive_whole_has_a_gain_of_one_over_every_base(
        tmp_path, base, kind, size):
    """By least squares over what the file's reader gives, at changes far below the steps of the
    base's type."""
    if base == "BF16":
        model = comfy.sd.load_diffusion_model_state_dict(
            {name: tensor.bfloat16() for name, tensor in weights().items()})
    else:
        model = packed_flux(base)
    plain = {
        name: tensor.dequantize() if is_packed(tensor) else tensor.float()
        for name, tensor in held(model).items()
    }
    lora = lora_for(weights(), seed=7, size=size)
    saved = save(source_of_model(patched(model, (lora, 1.0))), tmp_path / "a.gguf", kind)
    values = values_in(saved.path)
    arrived = whole = count = 0.0
    for name in (name for name, weight in weights().items() if weight.ndim > 1):
        layer = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        change = (0.5 *
                  lora[f"{layer}.lora_up.weight"] @ lora[f"{layer}.lora_down.weight"]).double()
        arrived += ((values[name] - plain[name]).double() * change).sum().item()
        whole += change.square().sum().item()
        count += change.numel()
    # of values that go to either side of a step of Q8_0, 0.025 of their spread apart
    chance = 0.01 / (size * count**0.5)
    assert abs(arrived / whole - 1) <= 0.01 + 3 * chance, (
        f"{arrived / whole:.3f} of the LoRA arrives"
    )
    assert base == "BF16" or saved.types[BLOCK] in ("Q6_K", "Q8_0")


def test_the_share_that_a_coarse_type_keeps_of_a_lora_is_told(tmp_path):
    lora, packed = (lora_for(weights(), size=0.005), 1.0), packed_flux("Q4_K")
    source = source_of_model(patched(packed, lora))
    saved = save(source, tmp_path / "a.gguf", "Q4_K", keep_loras=False)
    values, exact = values_in(saved.path), exact_values(patched(dense_flux("Q4_K"), lora))
    base = {
        name: tensor.dequantize() if is_packed(tensor) else tensor.float()
        for name, tensor in held(packed).items()
    }
    change = {name: exact[name] - base[name] for name in exact if exact[name].ndim > 1}
    gain = sum(((values[name] - base[name]) * change[name]).sum() for name in change) / sum(
        part.square().sum() for part in change.values())
    assert saved.types[BLOCK] == "Q4_K" and gain < 0.9
    assert abs(shares(saved.text)[0] / 100 - gain) < 0.002


def test_a_merge_of_two_packed_models_is_packed_once(tmp_path):
    first, second = packed_flux("Q4_K"), packed_flux("Q5_K", seed=1)
    merged = ModelMergeSimple().merge(first, second, 0.3)[0]
    saved = save(source_of_model(merged), tmp_path / "a.gguf", "Q8_0")
    values = values_in(saved.path)
    for name, weight in in_the_hosts_names(flux_file("Q4_K")).items():
        mean = 0.3 * weight + 0.7 * in_the_hosts_names(flux_file("Q5_K", 1))[name]
        expected = (
            pack_tensor(mean, FORMATS["Q8_0"]).dequantize() if saved.types[name] == "Q8_0" else mean
        )
        assert relative(values[name], expected) < (
            1e-3 if saved.types[name] == "Q8_0" else 0.005
        ), name
    assert shares(saved.text) == [pytest.approx(100, abs=0.5)]


def test_a_loaded_model_is_saved_with_its_patches_once(tmp_path):
    model = patched(dense_model(), (lora_for(weights(), seed=1), 1.0))
    save(source_of_model(model), tmp_path / "a.gguf", "Q8_0")
    run(model)  # now the host has written the patches into the weights
    save(source_of_model(model), tmp_path / "b.gguf", "Q8_0")
    first, second = (values_in(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- bad input ---

def with_value(value: float, name: str = BLOCK) -> Source:
    spoilt = weights() | {name: weights()[name].clone()}
    spoilt[name].view(-1)[1000 % spoilt[name].numel()] = value
    return source_of_model(comfy.sd.load_diffusion_model_state_dict(spoilt))


@pytest.mark.parametrize(("name", "kind"), [
    *((BLOCK, kind) for kind in ("Q4_K", "NF4", *HOST_TYPES)), ("img_in.weight", "Q4_K"),
    ("img_in.bias", "nvfp4")])
def test_values_that_are_no_numbers_are_refused_with_the_name_of_the_weight(tmp_path, name, kind):
    value = random.choice([math.nan, math.inf, -math.inf])
    with pytest.raises(SaveError, match=f"'{name}'.* NaN or infinite"):
        save(with_value(value, name), named(tmp_path, kind), kind)
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_a_type_take_one_that_holds_them(tmp_path):
    half = {name: tensor.half() for name, tensor in weights().items()}
    model = comfy.sd.load_diffusion_model_state_dict(half, model_options={"dtype": torch.float16})
    large = patched(
        model,
        ({"diffusion_model.img_in.diff": torch.full_like(weights()["img_in.weight"], 1e6)}, 1.0))
    tiny = with_value(0.0)
    tiny.weights[BLOCK].read = lambda start, stop: weights()[BLOCK][start:stop] * 1e-12
    first, second = (
        save(source_of_model(large), tmp_path / "a.gguf", "Q4_K"),
        save(tiny, tmp_path / "b.gguf", "Q4_K"),
    )
    assert (
        first.types["img_in.weight"] == second.types[BLOCK] == "BF16"
        and first.types[BLOCK] == "Q4_K"
    )
    assert (
        "img_in.weight is BF16: its values do not fit into F16." in first.text
        and f"{BLOCK} is BF16" in second.text
    )
    assert values_in(first.path)["img_in.weight"].mean() == pytest.approx(1e6, rel=0.01)
    assert relative(values_in(second.path)[BLOCK], weights()[BLOCK] * 1e-12) < 0.01


@pytest.mark.parametrize("kind", [*SAVE_TYPES, *HOST_TYPES])
def test_a_row_of_tiny_values_makes_no_value_of_the_file_a_nan(tmp_path, kind):
    spoilt = dict(weights())
    for size, name in zip((1e-24, 3e-22, 1e-21, 1e-41),
                          (name for name in weights() if name.endswith("mlp.0.weight"))):
        spoilt[name] = weights()[name].clone()
        spoilt[name][3] *= size
    saved = save(source_of_model(comfy.sd.load_diffusion_model_state_dict(dict(spoilt))),
                 named(tmp_path, kind), kind)
    found = values_in(saved.path)
    assert saved.types[BLOCK] == kind and all(values.isfinite().all() for values in found.values())
    assert relative(found[BLOCK], spoilt[BLOCK]) < 0.35


@pytest.mark.parametrize(
    ("size", "in_block", "in_outer"),
    [
        (1e-24, "BF16", "BF16"),
        (1e-41, "F32", "F32"),
        (1e20, "BF16", "BF16"),
        (3.4e38, "F32", "F32"),
    ],
)
def test_values_of_any_magnitude_are_in_a_type_that_holds_them(tmp_path, size, in_block, in_outer):
    """In GGUF, where the scales of every packed type are float16."""
    source = source_of_model(dense_model())
    for name in (BLOCK, "img_in.weight"):
        values = weights()[name].clamp(-1, 1) / weights()[name].clamp(-1, 1).abs().max() * size
        source.weights[name].read = lambda start, stop, values=values: values[start:stop]
    saved = save(source, tmp_path / "a.gguf", "Q8_0")
    assert (saved.types[BLOCK], saved.types["img_in.weight"]) == (in_block, in_outer)
    assert f"{BLOCK} is {in_block}: its values do not fit into Q8_0." in saved.text
    found = values_in(saved.path)
    for name in (BLOCK, "img_in.weight"):
        assert relative(found[name].double(), source.weights[name].read(0, None).double()) < 0.01


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize(("at", "kind"), [
    (0, "Q4_K"), (20, "Q4_K"), (43, "Q4_K"), (1, "NF4"), (20, "nvfp4")])
def test_a_cancel_at_any_weight_leaves_nothing(tmp_path, at, kind):
    def track(names, sizes):
        assert len(names) == len(sizes) == 44
        for index, name in enumerate(names):
            if index == at:
                raise Cancelled
            yield name

    with pytest.raises(Cancelled):
        save(source_of_model(dense_model()), named(tmp_path, kind), kind, track=track)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "a.gguf").write_text("old")
    with pytest.raises(WriteError, match="exists"):
        plan_file(source_of_model(dense_model()), tmp_path / "a.gguf", "Q4_K")


def test_what_no_file_can_hold_is_refused_by_name_and_what_changes_no_weight_is_named():
    clean = packed_flux("Q4_K")
    check_saveable(clean)
    assert unsaved_parts(clean) == []
    bypass, hooked, wrapped, replaced, sampled = (clean.clone() for _ in range(5))
    bypass.set_injections("bypass_lora", [])
    hooked.hook_patches["hook"] = {}
    wrapped.add_weight_wrapper("diffusion_model.img_in.weight", lambda weight: weight)
    replaced.add_object_patch("diffusion_model.img_in", torch.nn.Linear(2, 2))
    for model, named in (
        (bypass, "bypass_lora"),
        (hooked, "hooks"),
        (wrapped, "diffusion_model.img_in.weight"),
        (replaced, "diffusion_model.img_in"),
    ):
        with pytest.raises(SaveError, match=named):
            check_saveable(model)
    sampled.add_object_patch("model_sampling", object())
    sampled.set_model_attn1_patch(lambda *args: args)
    sampled.add_wrapper_with_key("diffusion_model", "cache", lambda *args: args)
    check_saveable(sampled)
    assert unsaved_parts(sampled) == [
        "model_sampling",
        "patches: attn1_patch",
        "diffusion_model: cache",
    ]


def test_a_model_of_two_bits_comes_with_a_warning(tmp_path):
    coarse, fine = source_of_model(packed_flux("Q2_K")), source_of_model(packed_flux("Q4_K"))
    assert "Caution" in save(coarse, tmp_path / "a.gguf", "Q4_K").text
    assert "Caution" not in save(fine, tmp_path / "b.gguf", "Q2_K").text


@pytest.mark.parametrize("format_name", ["INT8", "nvfp4"])
def test_the_hosts_quantised_layers_are_saved_by_their_values(tmp_path, format_name):
    packed, dense = flux_pair(format_name)
    saved = save(source_of_model(packed), tmp_path / "a.gguf", "Q8_0")
    values, exact = values_in(saved.path), exact_values(dense)
    assert values.keys() == exact.keys()
    for name, weight in exact.items():
        assert relative(values[name], weight) < 0.01, name


@pytest.mark.parametrize("source_of", [source_of_file, lambda path: source_of_model(
    load_diffusion_model(path))], ids=["file", "model"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.metadata])
def test_sizes_that_only_the_metadata_says_are_saved(name, source_of, tmp_path):
    family, path = FAMILIES[name], str(tmp_path / "a.gguf")
    weights = {key: torch.as_tensor(value) for key, value in random_weights(family).items()}
    save_file(weights, tmp_path / "a.safetensors", metadata=dict(family.metadata))
    save(source_of(str(tmp_path / "a.safetensors")), path, "Q8_0")
    dense = host_patcher(values_in(path), family)
    assert relative_error(run_family(load_diffusion_model(path), family),
                          run_family(dense, family)) < 1e-5


def test_what_tells_a_model_from_another_is_saved_with_it(tmp_path, monkeypatch):
    """Playground v2.5 is an SDXL but for two tensors that are no weights of its model."""
    family = FAMILIES["sdxl"]
    shrunken_detection(family, monkeypatch)
    marks = {f"edm_{name}": torch.rand(1, 4, 1, 1) for name in ("mean", "std")}
    save_file({f"model.diffusion_model.{key}": value for key, value in
               random_weights(family).items()} | marks, tmp_path / "playground.safetensors")
    model, _, _ = load_checkpoint(str(tmp_path / "playground.safetensors"), output_clip=False,
                                  output_vae=False)
    assert model.model.model_type.name == "EDM"
    assert {key for key in source_of_model(model).weights if key.startswith("edm")} == {*marks}
