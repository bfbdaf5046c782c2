"""Weights of optimum-quanto against the package, and layers without a bias."""
import random

import pytest
import torch
from conformance.base import read_weight, weight
from oracles import installed
from pack_api import WeightFileError, is_packed, open_weights
from quantizer_writers import quanto_bits
from safetensors.torch import save_file

# layer, norm of its block, and whether the norm is as wide as its columns
T5, LLAMA = "encoder.block.1.layer.0", "model.layers.3"
WITHOUT_BIAS = [
    *((f"{T5}.SelfAttention.{name}", f"{T5}.layer_norm", True) for name in "qkv"),
    (f"{T5}.SelfAttention.o", f"{T5}.layer_norm", False),
    ("encoder.block.1.layer.1.DenseReluDense.wi_0", "encoder.block.1.layer.1.layer_norm", True),
    ("encoder.block.1.layer.1.DenseReluDense.wo", "encoder.block.1.layer.1.layer_norm", False),
    *((f"{LLAMA}.self_attn.{name}_proj", f"{LLAMA}.input_layernorm", name != "o")
      for name in "qkvo"),
    (f"{LLAMA}.mlp.gate_proj", f"{LLAMA}.post_attention_layernorm", True),
    (f"{LLAMA}.mlp.down_proj", f"{LLAMA}.post_attention_layernorm", False),
    ("blocks.0.attn1.to_k", "blocks.0.norm1", True),
    ("blocks.0.attn2.to_q", "blocks.0.norm2", True),
    ("blocks.0.attn2.to_k", "blocks.0.norm2", False),
    ("layers.0.attention.to_q", "layers.0.attention_norm1", True),
    ("layers.0.attention.to_out.0", "layers.0.attention_norm1", False),
    ("layers.0.feed_forward.w2", "layers.0.ffn_norm1", False)]


def open_file(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return open_weights(str(path)).state_dict()


@pytest.mark.parametrize(("layer", "norm", "is_input"), WITHOUT_BIAS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_layer_without_a_bias_is_as_wide_as_the_norm_of_its_block(layer, norm, is_input, bits,
                                                                    tmp_path):
    rng = random.Random(f"{layer} {bits}")
    shape = rng.randint(1, 40) * 8, rng.randint(1, 8) * 32
    parts, values = quanto_bits(weight(*shape), bits, 32)
    beside = {f"{norm}.weight": torch.ones(shape[is_input]),
              # norms of q and k have the length of a head
              f"{layer.rpartition('.')[0]}.q_norm.weight": torch.ones(24),
              f"{layer.rpartition('.')[0]}.norm_k.weight": torch.ones(24)}
    weights = open_file(tmp_path / "model.safetensors", beside | {
        f"{layer}.{name}": part for name, part in parts.items()})
    assert weights.keys() == {*beside, f"{layer}.weight"} and is_packed(weights[f"{layer}.weight"])
    assert torch.equal(weights[f"{layer}.weight"].dequantize(), values)


@pytest.mark.parametrize(("layer", "norms", "message"), [
    ("a.q", {"a.norm1.weight": (64,), "a.norm2.weight": (32,)}, "no norm next to it that does"),
    ("a.q", {}, "no norm next to it that does"),
    ("a.q", {"b.norm.weight": (64,), "a.norm.bias": (64,)}, "no norm next to it that does"),
    ("a.q", {"a.norm.weight": (64, 1)}, "no norm next to it that does"),
    ("a.mystery", {"a.norm.weight": (64,)}, "no norm next to it that does"),
    ("a.q", {"a.norm.weight": (48,)}, "not whole rows of the 48 numbers of the norm next to it"),
    ("a.o", {"a.norm.weight": (7,)}, "not whole rows of the 7 numbers of the norm next to it"),
    ("a.q", {"a.norm.weight": (0,)}, "not whole rows of the 0 numbers of the norm next to it"),
    ("a.o", {"a.norm.weight": (0,)}, "not whole rows of the 0 numbers of the norm next to it"),
    ("a.o", {"a.norm.weight": (2**20,)}, "not whole rows of the 1048576 numbers"),
    (".".join("abcdefg") + ".q", {"a.norm.weight": (64,)}, "no norm next to it that does")])
def test_a_layer_of_which_nothing_says_the_rows_is_refused_by_its_name(layer, norms, message,
                                                                      tmp_path):
    parts, _ = quanto_bits(weight(96, 64), 4, 32)
    with pytest.raises(WeightFileError, match=(
            rf"^model\.safetensors: '{layer}', packed by quanto .*{message}.*\.$")):
        open_file(tmp_path / "model.safetensors", {
            f"{layer}.{name}": part for name, part in parts.items()} | {
                name: torch.ones(shape) for name, shape in norms.items()})


@pytest.mark.heavy
@pytest.mark.parametrize("type_name", ["qint4", "qint2", "qint8"])
def test_a_t5_of_quanto_has_the_values_of_the_package(type_name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("optimum-quanto==0.2.7"))
    quanto = pytest.importorskip("optimum.quanto")
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(
        d_model=256, d_ff=640, d_kv=64, num_heads=6, num_layers=2, vocab_size=64,
        feed_forward_proj="gated-gelu"))
    quanto.quantize(model, weights=getattr(quanto, type_name))
    quanto.freeze(model)
    stored = {name: value.clone() for name, value in model.state_dict().items()
              if "embed_tokens" not in name}
    weights = open_file(tmp_path / "model.safetensors", stored)
    layers = {name: module for name, module in model.named_modules()
              if hasattr(module, "weight_qtype") and module.weight_qtype is not None}
    assert len(layers) == 14
    for name, module in layers.items():
        packed, expected = weights[f"{name}.weight"], module.weight.dequantize()
        assert is_packed(packed) and packed.shape == expected.shape
        assert torch.equal(packed.dequantize(), expected)


@pytest.mark.heavy
@pytest.mark.parametrize("type_name", ["qint8", "qint4", "qint2", "qfloat8", "qfloat8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_are_those_of_the_package(type_name, dtype, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(installed("optimum-quanto==0.2.7"))
    quanto = pytest.importorskip("optimum.quanto")
    model = torch.nn.Sequential(torch.nn.Linear(256, 96, dtype=dtype))
    quanto.quantize(model, weights=getattr(quanto, type_name))
    quanto.freeze(model)
    stored = {name.removeprefix("0."): value for name, value in model.state_dict().items()}
    packed = read_weight(tmp_path, stored).dequantize()
    expected = model[0].weight.dequantize()
    # the package rounds the product to bfloat16 before it subtracts a shift
    is_rounded_twice = type_name in ("qint4", "qint2") and dtype == torch.bfloat16
    assert torch.allclose(packed.to(dtype), expected, rtol=0,
                          atol=expected.abs().max().item() / 128 if is_rounded_twice else 0)
