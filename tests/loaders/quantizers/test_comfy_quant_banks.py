"""Banks of experts in ComfyUI's own formats, in one matrix or one for each expert."""
import random

import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS
from damaged_marks import assert_refused
from host_formats import asymmetric_parts, asymmetric_values, in_host_format, mark_of, saved
from pack_api import WeightFileError, is_packed, open_weights

from featherweight.loaders.comfyui.comfy_quant_weights import (
    as_tensors,
    host_reads_flat_banks,
    read_marked,
)
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.layers.packed_layers import MoEExperts

FORMATS = {
    "int8_tensorwise": {}, "int8_tensorwise, rotated": {"convrot": True}, "convrot_w4a4": {},
    "float8_e4m3fn": {}, "float8_e5m2": {}, "asym_w4a8_int8": {}, "w6a8_int8": {}}


def write_bank(case, sizes, is_flat):
    """The parts of a bank with its mark, and its values (E, N, K)."""
    name, (experts, rows, columns) = case.partition(",")[0], sizes
    parts, values = [], []
    for seed in range(experts):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
        if "a8_int8" in name:
            of_one = asymmetric_parts(rows, columns, bits=6 if name == "w6a8_int8" else 4)
            of_one["weight_s_channel"] = of_one["weight_s_channel"] * (seed + 1)
            values.append(asymmetric_values(of_one))
        else:
            stored, value = in_host_format("weight", weight, name, **FORMATS[case])
            of_one = {part: tensor for part, tensor in stored.items() if part != "comfy_quant"}
            values.append(value)
        parts.append(of_one)
    joined = {part: torch.stack([of_one[part] for of_one in parts]) for part in parts[0]}
    if "weight_codebook" in joined:
        joined["weight_codebook"] = joined["weight_codebook"][0]
    if is_flat:
        joined = {part: tensor.flatten(0, 1) if tensor.ndim > 1 and "book" not in part else tensor
                  for part, tensor in joined.items()}
    settings = {"format": name, "num_experts": experts, **FORMATS[case]}
    return joined | {"comfy_quant": mark_of(settings)}, torch.stack(values)


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("case", FORMATS)
def test_a_bank_becomes_one_packed_tensor_of_its_experts(case, is_flat, tmp_path):
    sizes = random.randrange(1, 7), random.randrange(1, 40), 256 * random.randrange(1, 3)
    parts, values = write_bank(case, sizes, is_flat)
    path = saved(tmp_path / "model.safetensors", parts)
    assert needs_own_reader(path)
    file = open_weights(path)
    for formats in (COMFYUI_FORMATS, ()):  # exact, and as ComfyUI
        weights = as_tensors(file, read_marked(file), formats=formats)
        weight, = weights.values()
        assert is_packed(weight) and weight.shape == sizes
        assert (weight.dequantize() - values).abs().max() <= 1e-6 * values.abs().max()
        assert weight.nbytes <= 1.05 * sum(part.nbytes for part in parts.values()) + 8 * values[
            ..., 0].numel()


@pytest.mark.parametrize(("case", "is_flat", "is_mixed"), [
    ("int8_tensorwise, rotated", True, False), ("w6a8_int8", False, False),
    ("float8_e4m3fn", True, True), ("float8_e4m3fn", False, True)])
def test_each_expert_multiplies_by_its_values(case, is_flat, is_mixed, tmp_path):
    parts, values = write_bank(case, (3, 24, 512), is_flat)
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    weights = as_tensors(file, read_marked(file), formats=())
    other = {"M.comfy_quant": mark_of({"format": "int8_tensorwise"})} if is_mixed else {}
    experts = operations_for(weights | other).MoEExperts(3, 512, 24, bias=False,
                                                         dtype=torch.float32)
    assert isinstance(experts, MoEExperts)
    experts.load_state_dict({"weight": weights["L.weight"]})
    input = torch.randn(5, 512)
    with experts.bank_resident(input) as bank:
        for expert in (2, 0, 1):
            expected = input @ values[expert].T
            error = (bank.expert_linear(input, expert) - expected).abs().max()
            assert error < 1e-5 * expected.abs().max()


def test_an_expert_may_have_one_scale(tmp_path):
    codes, scale = torch.randint(-9, 9, (3, 8, 64), dtype=torch.int8), torch.rand(3) + 0.5
    for shape in ((3, 8, 64), (24, 64)):
        parts = {"weight": codes.view(shape), "weight_scale": scale, "comfy_quant": mark_of(
            {"format": "int8_tensorwise", "num_experts": 3})}
        file = open_weights(saved(tmp_path / f"{len(shape)}.safetensors", parts))
        weight, = as_tensors(file, read_marked(file)).values()
        assert torch.equal(weight.dequantize(), codes.float() * scale.view(3, 1, 1))


GOOD, _ = write_bank("int8_tensorwise", (3, 8, 64), is_flat=True)


def settings(**changes):
    return {"comfy_quant": mark_of({"format": "int8_tensorwise", "num_experts": 3} | changes)}


BAD = {
    "experts that do not divide the rows": (settings(num_experts=5), "the rows of 5 experts"),
    "no experts": (settings(num_experts=0), "the rows of 0 experts"),
    "fewer than none": (settings(num_experts=-3), "the rows of -3 experts"),
    "experts of text": (settings(num_experts="3"), "the rows of '3' experts"),
    "experts of a list": (settings(num_experts=[3]), r"the rows of \[3\] experts"),
    "experts of a fraction": (settings(num_experts=3.0), "the rows of 3.0 experts"),
    "true": (settings(num_experts=True), "the rows of True experts"),
    "many experts": (settings(num_experts=1 << 60), "the rows of 11529215"),
    "other experts than stacked": ({"weight": torch.ones(4, 6, 64).char()}, "the rows of 3 exp"),
    "no scale": ({"weight_scale": None}, "it has no weight_scale"),
    "scales of other rows": ({"weight_scale": torch.ones(7)}, r"weight_scale of float32 \(7,\)"),
    "scales of integers": ({"weight_scale": torch.ones(24).int()}, "weight_scale of int32"),
    "codes of 16 bits": ({"weight": torch.ones(24, 64).short()}, "weight of int16"),
    "codes of float32": ({"weight": torch.ones(24, 64)}, "weight of float32"),
    "codes of nothing": ({"weight": torch.ones(0, 64).char()}, "expected rows of codes"),
    "codes of one dimension": ({"weight": torch.ones(64).char()}, "expected rows of codes"),
    "a rotation of 48": (settings(convrot=True, convrot_groupsize=48), "groups of 48 of 64"),
    "a rotation of gigabytes": (settings(convrot=True, convrot_groupsize=1 << 40), "groups of 109"),
    "a rotation of other columns": (settings(convrot=True), "groups of 256 of 64"),
    "levels without scales": (settings(format="asym_w4a8_int8") | {"weight_scale": None},
                              "it has no weight_s_rel"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_banks_are_a_sentence_with_file_and_layer(case, tmp_path):
    changes, message = BAD[case]
    parts = {name: part for name, part in (GOOD | changes).items() if part is not None}
    path = saved(tmp_path / "model.safetensors", parts)
    assert_refused(path, message)


def test_a_flat_bank_that_nobody_reads_is_a_sentence(tmp_path):
    if host_reads_flat_banks():
        pytest.skip("this ComfyUI reads them")
    parts = GOOD | settings(format="mxfp8")
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    with pytest.raises(WeightFileError, match=(
            r"^model.safetensors: 'L.weight' is in a quantized format that this ComfyUI does not"
            r" read \(a flat bank of experts in 'mxfp8'\). Update ComfyUI")):
        as_tensors(file, read_marked(file))


def test_stacked_banks_of_other_formats_stay_apart_for_comfyui(tmp_path):
    parts = {"weight": torch.ones(4, 32, 32, dtype=torch.uint8), "comfy_quant": mark_of(
        {"format": "nvfp4", "num_experts": 4}), "weight_scale_2": torch.ones(4),
        "weight_scale": torch.ones(4, 128, 4).to(torch.float8_e4m3fn)}
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    assert as_tensors(file, read_marked(file)).keys() == {f"L.{name}" for name in parts}


@pytest.mark.parametrize("group", [8, 16, 32])
def test_columns_of_a_group_of_six_bits_follow_from_the_sizes(group, tmp_path):
    parts = asymmetric_parts(12, 512, bits=6, level_group=group)
    parts["comfy_quant"] = mark_of({"format": "w6a8_int8"})
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    weight, = as_tensors(file, read_marked(file)).values()
    expected = asymmetric_values(parts, group)
    assert (weight.dequantize() - expected).abs().max() <= 1e-6 * expected.abs().max()
    parts["comfy_quant"] = mark_of({"format": "w6a8_int8", "group_size": 64})
    file = open_weights(saved(tmp_path / "other.safetensors", parts))
    with pytest.raises(WeightFileError, match="bits a value"):
        as_tensors(file, read_marked(file))


@pytest.mark.parametrize("is_flat", [True, False])
def test_banks_of_other_parts_of_a_checkpoint_are_read_too(is_flat, tmp_path):
    parts, values = write_bank("int8_tensorwise", (3, 8, 256), is_flat)
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    weight, = as_tensors(file, read_marked(file), "model.", ()).values()
    assert torch.equal(weight.dequantize(), values)


def test_six_bits_that_this_comfyui_does_not_read_name_the_one_that_does(tmp_path):
    if "w6a8_int8" in QUANT_ALGOS:
        pytest.skip("this ComfyUI reads it")
    parts = asymmetric_parts(12, 512, bits=6) | {"comfy_quant": mark_of({"format": "w6a8_int8"})}
    file = open_weights(saved(tmp_path / "model.safetensors", parts))
    with pytest.raises(WeightFileError, match=(
            r"^model.safetensors: .*\('w6a8_int8', which needs ComfyUI 0.38 or `compute` at")):
        as_tensors(file, read_marked(file), formats=())
