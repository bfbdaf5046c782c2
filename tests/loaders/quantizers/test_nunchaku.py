"""Weights that Nunchaku quantised: layers that are not alike, and the converter."""
import importlib
import sys
import types

import nunchaku_writer as writer
import pytest
import torch
from families import relative_error
from oracles import installed
from pack_api import WeightFileError, is_packed, open_weights, packed_operations
from safetensors.torch import save_file

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
PRECISIONS = pytest.mark.parametrize("precision", ["int4", "nvfp4"])
LAYER = "layers.0.proj"


def read(path, tensors):
    save_file({name: tensor.clone(memory_format=torch.contiguous_format)
               for name, tensor in tensors.items()}, path)
    return open_weights(str(path)).state_dict()


def layer_of(rows=256, columns=128, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return writer.Layer(weight, torch.randn(rows, generator=generator), **options)


def named(parts, layer=LAYER):
    return {f"{layer}.{part}": tensor for part, tensor in parts.items()}


@PRECISIONS
def test_a_weight_may_lack_low_rank_and_bias(precision, tmp_path):
    layer = layer_of(precision=precision)
    parts = {part: tensor for part, tensor in layer.parts.items()
             if part not in ("proj_down", "proj_up", "bias", "wtscale")}
    down, up = (layer.parts[part] for part in ("proj_down", "proj_up"))
    zeros = named(parts | {"proj_down": down * 0, "proj_up": up * 0}, "zeros")
    weights = read(tmp_path / "a.safetensors", named(parts) | zeros)
    assert set(weights) == {f"{LAYER}.weight", "zeros.weight"}
    assert torch.equal(*(weights[f"{layer}.weight"].dequantize() for layer in (LAYER, "zeros")))


def test_padding_is_dropped_when_a_layer_loads(tmp_path):
    layer = layer_of()
    weights = read(tmp_path / "a.safetensors", named(layer.parts, "linear"))
    model = torch.nn.Module()
    model.linear = packed_operations().Linear(100, 200, dtype=torch.float32)
    model.load_state_dict(weights)
    input = torch.randn(3, 100)
    expected = input @ layer.weight[:200, :100].t() + layer.bias[:200]
    assert relative_error(model.linear(input), expected) < 1e-6


def test_models_of_which_nothing_is_known_are_a_sentence(tmp_path):
    parts = named(layer_of(384).parts, "down_blocks.1.transformer_blocks.0.attn.to_qkv")
    with pytest.raises(WeightFileError, match="none of Flux, Qwen-Image, Z-Image"):
        read(tmp_path / "a.safetensors", named(layer_of(384).parts, "blocks.0.attn.to_qkv")
             | named(layer_of(384).parts, "transformer_blocks.0.attn.to_qkv") | parts)


def test_layers_that_are_not_fused_keep_their_names(tmp_path):
    layers = ("layers.0.feed_forward.net.0.proj", "layers.0.feed_forward.net.2", "proj_out")
    tensors = {}
    for layer in layers:
        tensors |= named(layer_of().parts, layer)
    weights = read(tmp_path / "a.safetensors", tensors)
    assert {name.rpartition(".")[0] for name in weights} == set(layers)


def test_half_of_a_joined_layer_is_a_sentence(tmp_path):
    block = "single_transformer_blocks.0"
    tensors = named(layer_of(384).parts, f"{block}.qkv_proj") | {
        "transformer_blocks.0.norm1.linear.weight": torch.ones(1, 1)}
    with pytest.raises(WeightFileError, match=f"'{block}.qkv_proj'.*belongs to '{block}.mlp_fc1'"):
        read(tmp_path / "a.safetensors", tensors)


def test_layers_of_other_numbers_are_not_taken_apart(tmp_path, caplog):
    """Where the layers after one attention are smoothed by other numbers, the values stay."""
    block, factors = "transformer_blocks.0", torch.rand(128).bfloat16() + 0.5
    tensors = {f"{block}.norm1.linear.weight": torch.ones(1, 1)}
    for name, rows in (("to_qkv", 384), ("add_qkv_proj", 384), ("to_out.0", 128),
                       ("to_add_out", 128)):
        ones = torch.ones(128).bfloat16() if rows == 128 else None
        layer = layer_of(rows, divisors=ones)
        tensors |= named(layer.parts, f"{block}.attn.{name}")
        original = layer.parts["smooth_factor"] if rows > 128 else factors * len(tensors)
        tensors[f"{block}.attn.{name}.smooth_factor_orig"] = original
    weights = read(tmp_path / "a.safetensors", tensors)
    assert "a.safetensors: the layers after the attention of transformer_blocks.0" in caplog.text
    out = weights[f"{block}.attn.to_out.0.weight"].dequantize()
    ones = torch.ones(128).bfloat16()
    assert relative_error(out, layer_of(128, divisors=ones).weight) < 1e-6



# --- beside the converter

PACKAGE = "deepcompressor"
BACKEND = ("", ".backend", ".backend.nunchaku", ".backend.tinychat", ".utils")


@pytest.fixture
def converter(monkeypatch):
    """deepcompressor's own converter, without the rest of the package and what that needs."""
    folder = installed("deepcompressor-toolkit==0.1.0")
    for name in BACKEND:
        module = types.ModuleType(f"{PACKAGE}{name}")
        module.__path__ = [str(folder / f"{PACKAGE}{name}".replace(".", "/"))]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return importlib.import_module(f"{PACKAGE}.backend.nunchaku.convert")


def quantized(weight, dtype, group=64):
    """Codes times scales in float64, and the scales, (N, 1, K / group, 1)."""
    groups = weight.view(len(weight), -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).to(dtype)
    codes = (groups / scale.float()).round().clamp(-7, 7)
    return (codes.double() * scale.double()).view(weight.shape), scale.unsqueeze(1)


@pytest.mark.heavy
@HALVES
@pytest.mark.parametrize("number", ["a number for each row", "a number for the tensor"])
def test_nvfp4_of_the_converter_has_its_values(number, dtype, converter, tmp_path):
    rows, columns, levels = 256, 384, writer.E2M1.double()
    weight = torch.randn(rows, columns).double() * 0.02
    outer = torch.full((rows,), weight.abs().max() / (448 * 6)).to(dtype)
    if number == "a number for each row":
        outer = (weight.abs().amax(1) / (448 * 6)).to(dtype)
    groups = weight.view(rows, -1, 16) / outer.double().view(-1, 1, 1)
    scales = (groups.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    codes = ((groups / scales.double().unsqueeze(-1)).unsqueeze(-1) - levels).abs().argmin(-1)
    values = levels[codes] * scales.double().unsqueeze(-1) * outer.double().view(-1, 1, 1)
    values = values.view(rows, columns)
    smooth = (torch.rand(columns) + 0.5).to(dtype)
    parts = converter.convert_to_nunchaku_w4x4y16_linear_state_dict(
        values.to(dtype), scale=(outer if number == "a number for each row" else outer[:1]).view(
            -1, 1, 1, 1), smooth=smooth, float_point=True, subscale=scales.to(dtype).view(
            rows, 1, -1, 1))
    weights = read(tmp_path / "a.safetensors", named(
        {part: tensor for part, tensor in parts.items() if tensor is not None}))
    # the converter rounds to codes what was rounded to 16 bits before
    wrong = (weights[f"{LAYER}.weight"].dequantize() - values / smooth.double()).abs() > 1e-6
    assert wrong.float().mean() < 0.01


@pytest.mark.heavy
@HALVES
@pytest.mark.parametrize("is_single", [False, True])
def test_blocks_of_flux_of_the_converter_have_their_values(is_single, dtype, converter, tmp_path):
    hidden, rank = 256, 32
    state, scales, smooths, branches, values, biases = {}, {}, {}, {}, {}, {}
    block = "single_transformer_blocks.0" if is_single else "transformer_blocks.0"
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def smooth_of(name, columns):
        key = f"{block}.{name}"
        if key not in smooths:
            smooths[key] = (torch.rand(columns, generator=generator) + 0.5).to(dtype)
        return smooths[key].double()

    def branch_of(name, rows, columns):
        key = f"{block}.{name}"
        if key not in branches:
            branches[key] = {"a.weight": (random(rank, columns) * 0.02).to(dtype),
                             "b.weight": (random(rows, rank) * 0.05).to(dtype)}
        return branches[key]["a.weight"].double(), branches[key]["b.weight"].double()

    def add(names, rows, columns, smooth_name, branch_name, is_shifted=False, is_fused=False):
        """Layers that share divisors and a low rank, of which each has its rows."""
        smooth, (down, up) = smooth_of(smooth_name, columns), branch_of(
            branch_name, rows * len(names), columns)
        if not is_fused:
            down = (down / smooth).to(dtype).double()
        for index, name in enumerate(names):
            key = f"{block}.{name}"
            main, scales[f"{key}.weight.scale.0"] = quantized(random(rows, columns) * 0.02, dtype)
            state[f"{key}.weight"] = main.to(dtype)
            bias, part = random(rows), up[index * rows:(index + 1) * rows]
            if is_fused:
                values[name] = (main + part @ down) / smooth
            else:
                values[name] = main / smooth + part @ down
            biases[name] = bias
            if is_shifted:
                state[f"{key[:-7]}.shift"] = torch.tensor([writer.SHIFT])
                bias = bias - values[name].sum(1).float() * writer.SHIFT
            state[f"{key}.bias"] = bias.to(dtype)

    def add_modulation(name, parts):
        key = f"{block}.{name}"
        values[name], scales[f"{key}.weight.scale.0"] = quantized(
            random(parts * hidden, hidden) * 0.02, dtype)
        state[f"{key}.weight"] = values[name].to(dtype)
        state[f"{key}.bias"] = random(parts * hidden).to(dtype)
        biases[name] = state[f"{key}.bias"].float()

    query = [f"attn.to_{part}" for part in "qkv"]
    if is_single:
        for name in ("attn.norm_q", "attn.norm_k"):
            state[f"{block}.{name}.weight"] = torch.ones(128)
        add_modulation("norm.linear", 3)
        add(query, hidden, hidden, "attn.to_q", "attn.to_q")
        add(["proj_out.linears.0"], hidden, hidden, "proj_out.linears.0", "proj_out.linears.0",
            is_fused=True)
        add(["proj_mlp"], 4 * hidden, hidden, "attn.to_q", "proj_mlp")
        name = "proj_out.linears.1.linear"
        add([name], hidden, 4 * hidden, name, name, is_shifted=True)
        fused = [("attn.to_v", "proj_out.linears.0")]
        convert = converter.convert_to_nunchaku_flux_single_transformer_block_state_dict
    else:
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            state[f"{block}.attn.{name}.weight"] = torch.ones(128)
        add_modulation("norm1.linear", 6)
        add_modulation("norm1_context.linear", 6)
        add(query, hidden, hidden, "attn.to_q", "attn.to_q")
        add([f"attn.add_{part}_proj" for part in "qkv"], hidden, hidden, "attn.add_k_proj",
            "attn.add_k_proj")
        for name in ("attn.to_out.0", "attn.to_add_out"):
            add([name], hidden, hidden, "attn.to_out.0", name, is_fused=True)
        for name in ("ff", "ff_context"):
            add([f"{name}.net.0.proj"], 4 * hidden, hidden, *2 * [f"{name}.net.0.proj"])
            add([f"{name}.net.2.linear"], hidden, 4 * hidden, *2 * [f"{name}.net.2.linear"],
                is_shifted=True)
        fused = [("attn.to_v", "attn.to_out.0"), ("attn.add_v_proj", "attn.to_out.0")]
        convert = converter.convert_to_nunchaku_flux_transformer_block_state_dict
    tensors = convert(state, scales, smooths, branches, block)
    tensors = {f"{block}.{name}": tensor for name, tensor in tensors.items()}
    tensors["transformer_blocks.9.norm1.linear.weight"] = torch.ones(1, 1)
    for name, after in fused:
        factors = smooths[f"{block}.{after}"].double()
        values[name] = values[name] * factors.unsqueeze(1)
        biases[name] = state[f"{block}.{name}.bias"].double() * factors
    if is_single:
        parts = ["proj_out.linears.0", "proj_out.linears.1.linear"]
        values["proj_out"] = torch.cat([values.pop(name) for name in parts], 1)
        biases["proj_out"] = sum(biases.pop(name) for name in parts)
        values["attn.to_qkv_mlp_proj"] = torch.cat([
            values.pop(name) for name in (*query, "proj_mlp")])
    weights = read(tmp_path / "a.safetensors", tensors)
    for name, expected in values.items():
        weight = weights[f"{block}.{name.removesuffix('.linear') if 'ff' in name else name}.weight"]
        assert is_packed(weight)
        limit = 1e-6 if "norm" not in name else 5e-3  # the converter rounds the zeros to 16 bits
        assert relative_error(weight.dequantize().double(), expected) < limit, name
    for name, expected in biases.items():
        bias = weights[f"{block}.{name.removesuffix('.linear') if 'ff' in name else name}.bias"]
        assert (bias - expected).abs().max() < 0.03, name
