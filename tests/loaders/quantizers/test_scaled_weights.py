"""Weights with scales without a marker, against transformers and diffusers, which write them."""
import json

import comfy.sd
import pytest
import torch
from oracles import installed
from patched_models import (
    LIMIT,
    error_by_effect,
    lora_for,
    patched,
    relative,
    run,
    tiny_flux,
)
from safetensors.torch import save_file

from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.files.open_weights import open_weights
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.ops.tensor.packed_layout import is_packed

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="it is the oracle")

pytestmark = pytest.mark.usefixtures("small_models")


def written(values, block=(128, 128)):
    """What a file holds of a weight: codes and scales, a last block of each axis may be short."""
    rows, columns = values.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]),
                    slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = values[part].abs().max() / 448
            codes[part] = (values[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def by_transformers(codes, scale):
    return fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)


def read(path, tensors):
    save_file(tensors, path)
    return open_weights(str(path)).state_dict()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (512, 128)])
def test_values_are_those_of_transformers(shape, scale_dtype, tmp_path):
    codes, scale = written(torch.randn(shape) * 0.02)
    scale = scale.to(scale_dtype)
    weights = read(tmp_path / "a.safetensors", {
        "L.weight": codes, "L.weight_scale_inv": scale, "L.activation_scale": torch.ones(1),
        "L.bias": torch.ones(3)
    })
    assert set(weights) == {"L.weight", "L.bias"} and is_packed(weights["L.weight"])
    expected = by_transformers(codes, scale.float())
    assert torch.equal(weights["L.weight"].dequantize(), expected)
    stored = codes.nbytes + scale.nbytes
    assert weights["L.weight"].nbytes < 1.05 * stored


@pytest.mark.parametrize("shape", [(200, 256), (256, 200), (130, 131)])
def test_the_last_blocks_may_be_short(shape, tmp_path):
    codes, scale = written(torch.randn(shape) * 0.02)
    weights = read(tmp_path / "a.safetensors", {"L.weight": codes, "L.weight_scale_inv": scale})
    of_values = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:shape[0], :shape[1]]
    assert torch.equal(weights["L.weight"].dequantize(), codes.float() * of_values)


def test_other_blocks_are_told_by_their_number(tmp_path):
    codes, scale = written(torch.randn(96, 192) * 0.02, block=(32, 64))
    weights = read(tmp_path / "a.safetensors", {"L.weight": codes, "L.weight_scale_inv": scale})
    of_values = scale.repeat_interleave(32, 0).repeat_interleave(64, 1)
    assert torch.equal(weights["L.weight"].dequantize(), codes.float() * of_values)


FP8, INT8, NIBBLES = torch.float8_e4m3fn, torch.int8, torch.uint8


@pytest.mark.parametrize(("weight", "parts"), [
    (torch.ones(128, 128).to(FP8), {"weight_scale_inv": torch.ones(7, 3)}),
    (torch.ones(2, 128, 128).to(FP8), {"weight_scale_inv": torch.ones(2, 1, 1)}),
    (torch.ones(128, 128).to(FP8), {"weight_scale": torch.ones(64)}),
    (torch.ones(128, 128).to(FP8), {"weight_scale": torch.ones(128),
                                    "weight_scale_2": torch.ones(1)}),
    (torch.ones(128, 128).to(INT8), {"weight_scale": torch.ones(64)}),
    (torch.ones(128, 128).to(NIBBLES), {"weight_scale": torch.ones(128, 16).to(FP8)}),
    (torch.ones(128, 128).to(NIBBLES), {"weight_scale": torch.ones(128, 8).to(FP8),
                                        "weight_scale_2": torch.ones(1)}),
])
def test_parts_that_do_not_belong_together_are_a_sentence(weight, parts, tmp_path):
    tensors = {"L.weight": weight} | {f"L.{part}": tensor for part, tensor in parts.items()}
    with pytest.raises(WeightFileError, match="a.safetensors.*L.weight' is .* expected fp8"):
        read(tmp_path / "a.safetensors", tensors)


def test_factors_that_are_not_of_the_columns_are_a_sentence(tmp_path):
    tensors = {"L.weight": torch.ones(128, 64).to(FP8), "L.weight_scale": torch.ones(128),
               "L.pre_quant_scale": torch.ones(128)}
    with pytest.raises(WeightFileError, match=r"a.safetensors.*'L': its pre_quant_scale is "
                                              r"float32 \(128,\)"):
        read(tmp_path / "a.safetensors", tensors)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.rand(96), torch.rand(96, 1).bfloat16()])
@pytest.mark.parametrize("dtype", [FP8, INT8], ids=str)
def test_scales_of_rows_and_of_a_tensor(dtype, scale, tmp_path):
    codes = torch.randint(-100, 100, (96, 80)).float().to(dtype)
    weights = read(tmp_path / "a.safetensors", {
        "L.weight": codes, "L.weight_scale": scale, "L.input_scale": torch.ones(1)})
    assert set(weights) == {"L.weight"}
    of_rows = scale.float().view(-1, 1) if scale.numel() > 1 else scale.float()
    assert torch.equal(weights["L.weight"].dequantize(), codes.float() * of_rows)


def test_values_are_those_of_black_forest_labs(tmp_path):
    bfl = pytest.importorskip("diffusers.quantizers.bfl.utils", reason="it is the oracle")
    values = (torch.randn(96, 256) * 0.02).bfloat16()
    codes, scale = bfl.quantize_fp8r(values)
    weights = read(tmp_path / "a.safetensors", {"L.weight": codes, "L.weight_scale": scale})
    assert torch.equal(weights["L.weight"].dequantize(), bfl.dequantize_fp8r(codes, scale))
    codes, scale, of_tensor = bfl.quantize_nvfp4(values)
    weights = read(tmp_path / "b.safetensors", {
        "L.weight": codes, "L.weight_scale": scale, "L.weight_scale_2": of_tensor})
    assert set(weights) == {"L.weight"} and is_packed(weights["L.weight"])
    assert torch.equal(weights["L.weight"].dequantize(),
                       bfl.dequantize_nvfp4(codes, scale, of_tensor))


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_values_are_those_of_compressed_tensors(strategy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("compressed-tensors==0.20.0", "loguru"))
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    values = torch.randn(96, 256) * 0.02
    scale = (values.abs().amax(1, keepdim=True) if strategy == "channel"
             else values.abs().amax().view(1)) / 448
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    codes = quantize(values, scale, torch.zeros_like(scale), args, dtype=FP8)
    weights = read(tmp_path / "a.safetensors", {"L.weight": codes, "L.weight_scale": scale})
    expected = dequantize(codes, scale, args=args, dtype=torch.float32)
    assert torch.equal(weights["L.weight"].dequantize(), expected)


def test_nvfp4_without_a_marker_has_the_low_nibble_first(tmp_path):
    codes = torch.tensor([[0x21] * 8, [0x9F] * 8], dtype=torch.uint8)
    scale = torch.tensor([[2.0], [0.5]]).to(FP8)
    weights = read(tmp_path / "a.safetensors", {
        "L.weight": codes, "L.weight_scale": scale, "L.weight_scale_2": torch.tensor(3.0)})
    expected = torch.tensor([[0.5, 1.0] * 8, [-6.0, -0.5] * 8]) * torch.tensor([[6.0], [1.5]])
    assert torch.equal(weights["L.weight"].dequantize(), expected)


def test_other_tensors_of_such_names_are_left_alone(tmp_path):
    tensors = {"L.weight": torch.ones(4, 4), "M.weight_scale": torch.ones(1)}
    weights = read(tmp_path / "a.safetensors", tensors)
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    assert not needs_own_reader(str(tmp_path / "a.safetensors"))
    marker = {"L.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=NIBBLES)}
    tensors = {"L.weight": torch.ones(4, 4).to(FP8), "L.weight_scale": torch.tensor(1.0)} | marker
    assert set(read(tmp_path / "b.safetensors", tensors)) == set(tensors)


@pytest.fixture(params=["file", "folder"])
def model(request, tmp_path):
    """A Flux with its blocks in fp8, as a file in ComfyUI's names or in a folder, and its dense
    values."""
    stored, values = {}, {}
    for name, tensor in tiny_flux().items():
        stored[name] = values[name] = tensor
        if tensor.ndim == 2 and "_blocks." in name:
            codes, scale = written(tensor)
            stored |= {name: codes, f"{name}_scale_inv": scale}
            values[name] = by_transformers(codes, scale)
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    if request.param == "file":
        return str(path), values
    (tmp_path / "config.json").write_text(json.dumps({
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}))
    return str(tmp_path), values


def test_a_model_draws_what_its_dense_values_draw_and_takes_loras(model):
    path, values = model
    assert needs_own_reader(path)
    ours = load_diffusion_model(path)
    dense = comfy.sd.load_diffusion_model_state_dict(
        {name: value.clone() for name, value in values.items()})
    assert sum(map(is_packed, ours.model.diffusion_model.parameters())) >= 13
    assert relative(run(ours), run(dense)) < 1e-5
    loras = [(lora_for(values, seed=1), 0.8), (lora_for(values, "dora", seed=2), 0.5)]
    expected = run(patched(dense, *loras))
    assert error_by_effect(run(patched(ours, *loras)), expected, run(dense)) < LIMIT
