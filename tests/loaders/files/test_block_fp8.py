"""fp8 with a scale for each block, against transformers, which writes it."""
import json

import comfy.sd
import pytest
import torch
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

from featherweight.loaders.diffusion import load_diffusion_model
from featherweight.loaders.files import open_weights
from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.reader_choice import needs_own_reader
from featherweight.ops.packed_layout import is_packed

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


@pytest.mark.parametrize(("weight", "scale", "problem"), [
    (None, torch.ones(1, 1), "there is no such weight"),
    (torch.ones(128, 128), torch.ones(1, 1), r"the weight is float32 \(128, 128\)"),
    (torch.ones(128, 128).to(torch.float8_e4m3fn), torch.ones(7, 3), r"float32 \(7, 3\)"),
    (torch.ones(2, 128, 128).to(torch.float8_e4m3fn), torch.ones(2, 1, 1), r"\(2, 128, 128\)"),
])
def test_parts_that_do_not_belong_together_are_a_sentence(weight, scale, problem, tmp_path):
    tensors = {"L.weight_scale_inv": scale} | ({} if weight is None else {"L.weight": weight})
    with pytest.raises(WeightFileError, match=f"a.safetensors.*L.weight_scale_inv.*{problem}"):
        read(tmp_path / "a.safetensors", tensors)


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
