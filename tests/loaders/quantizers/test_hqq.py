"""Weights and folders of HQQ against its package."""
import pytest
import torch
from conformance.base import read_weight
from oracles import installed
from pack_api import is_packed, open_weights

REQUIREMENTS = "hqq==0.2.8.post1", "termcolor", "accelerate"


@pytest.fixture
def hqq(monkeypatch):
    monkeypatch.syspath_prepend(installed(*REQUIREMENTS))
    return pytest.importorskip("hqq.core.quantize")


def settings(hqq, bits, group):
    return hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)


@pytest.mark.heavy
@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize(("dtype", "group"), [
    (torch.float16, 64), (torch.bfloat16, 32), (torch.float32, 128)], ids=str)
def test_values_are_those_of_the_package(hqq, bits, dtype, group, tmp_path):
    linear = torch.nn.Linear(256, 96, dtype=dtype)
    layer = hqq.HQQLinear(linear, settings(hqq, bits, group), compute_dtype=dtype, device="cpu")
    packed = read_weight(tmp_path, dict(layer.state_dict()))
    meta = {**layer.meta, "compute_dtype": torch.float32,
            "scale": layer.meta["scale"].float(), "zero": layer.meta["zero"].float()}
    expected = hqq.Quantizer.dequantize(layer.W_q, meta)
    # products of scales and zeros of 32 bits are rounded first
    limit = 0 if dtype.itemsize == 2 else 1e-6 * expected.abs().max().item()
    assert torch.allclose(packed.dequantize(), expected, rtol=0, atol=limit)


@pytest.mark.heavy
def test_a_folder_that_the_package_saves_is_read(hqq, tmp_path):
    transformers = pytest.importorskip("transformers")
    models = pytest.importorskip("hqq.models.hf.base")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    model = transformers.Qwen3ForCausalLM(config).half()
    matrices = {name for name, value in model.state_dict().items()
                if ".layers." in name and value.ndim == 2}
    models.AutoHQQHFModel.quantize_model(model, quant_config=settings(hqq, 4, 64),
                                         compute_dtype=torch.float16, device="cpu")
    models.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "encoder"))
    tensors = open_weights(tmp_path / "encoder").state_dict()
    packed = {name for name, tensor in tensors.items() if is_packed(tensor)}
    assert packed == matrices
    layer = model.model.layers[0].self_attn.q_proj
    found = tensors["model.layers.0.self_attn.q_proj.weight"].dequantize()
    assert torch.allclose(found, layer.dequantize().float(), rtol=0, atol=1e-3)
