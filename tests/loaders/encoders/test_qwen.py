"""Qwen's text encoders: what their files change, and files that lack something."""
import comfy.sd
import gguf
import pytest
import torch
from encoders import qwen, qwen35, qwen_vl
from encoders.encoder import (
    TOKENS,
    TOWERS,
    error_of,
    hidden_states,
    load_encoder,
    random_weights,
    small_towers,
    text_model,
    write_encoder,
)
from families import relative_error
from pack_api import is_packed, load_text_encoder

from devtools.files.gguf_files import dequantize, write_gguf
from featherweight.loaders.encoders.arch import arch_of
from featherweight.loaders.encoders.archs.qwen import Qwen3VL, Qwen3VL32B, Qwen25VL
from featherweight.loaders.encoders.archs.qwen35 import Qwen35

pytestmark = pytest.mark.usefixtures("small_models")

ALL = {**qwen.ENCODERS, **qwen_vl.ENCODERS, **qwen35.ENCODERS}


def picture(height=160, width=128):
    pixels = torch.rand((1, height, width, 3), generator=torch.Generator().manual_seed(1))
    return {"type": "image", "data": pixels}


def dequantized(path):
    """A file with the same values as F32, as gguf-py reads them. Returns its path."""
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
               for tensor in gguf.GGUFReader(path).tensors}
    write_gguf(path.with_name("dequantized.gguf"), tensors, type_of=lambda name, values: "F32",
               architecture=None)
    return path.with_name("dequantized.gguf")


@pytest.mark.parametrize(
    ("name", "packed_type"),
    [
        ("qwen2.5-3b", "Q4_K"),
        ("qwen3-0.6b", "Q4_K"),
        ("qwen3-vl-4b", "Q4_K"),
        ("qwen3.5-4b", "Q4_K"),
        ("qwen3.5-27b", "Q6_K"),
    ],
)
def test_k_quants_give_the_hidden_states_of_the_same_values_dequantized(
    name, packed_type, tmp_path
):
    encoder, path = ALL[name], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        write_encoder(path, encoder, random_weights(encoder), packed_type)
        packed, plain = load_encoder(path, encoder), load_encoder(dequantized(path), encoder)
    layers = text_model(packed).transformer.model.layers
    assert all(is_packed(value) for value in layers.state_dict().values() if value.ndim == 2)
    assert relative_error(hidden_states(packed), hidden_states(plain)) < 1e-4


def test_plain_weights_are_reordered_as_packed_ones_are(tmp_path):
    encoder, path = ALL["qwen3.5-27b"], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        weights = random_weights(encoder)
        write_encoder(path, encoder, weights, "F32")
        assert error_of(load_encoder(path, encoder), encoder, weights) < 1e-4


def a_file(width: int, layers: int) -> dict[str, torch.Tensor]:
    """The tensors by which Qwen3 is told, each layer with one of them."""
    names = [
        "attn_q.weight", "attn_q_norm.weight", "attn_norm.weight", "ffn_gate.weight",
        "ffn_norm.weight"
    ]
    layer = {name: torch.zeros(width if "norm" in name else (1, width)) for name in names}
    weights = {
        f"blk.{number}.{name}": tensor for number in range(layers)
        for name, tensor in layer.items()
    }
    return {
        "token_embd.weight": torch.zeros(1, width), "output.weight": torch.zeros(1, width),
        **weights
    }


@pytest.mark.parametrize(("width", "layers", "says_so", "te_model"), [
    (2560, 36, False, "QWEN3_4B"), (2560, 36, True, "QWEN3VL_4B"), (4096, 36, False, "QWEN3_8B"),
    (4096, 36, True, "QWEN3VL_8B"), (5120, 64, False, "QWEN3VL_32B")])
def test_qwen3_vl_without_its_tower_is_what_its_metadata_and_size_say(
    width, layers, says_so, te_model
):
    weights = a_file(width, layers)
    metadata = {"qwen3vl.n_deepstack_layers": 3} if says_so else {}
    converted = arch_of(weights).convert(weights, metadata)
    assert comfy.sd.detect_te_model(converted).name == te_model
    assert (
        sum(
            tensor.untyped_storage().nbytes()
            for name, tensor in converted.items()
            if "visual" in name
        )
        < 100
    )


def test_qwen3_is_not_given_the_tower_of_a_qwen3_vl_in_its_folder(tmp_path):
    encoder, path = ALL["qwen3-vl-4b"], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        write_encoder(path, encoder, random_weights(encoder), architecture="qwen3",
                      metadata={"qwen3.block_count": 3})
        options = qwen.ENCODERS["qwen3-4b"].model_options | encoder.model_options
        alone, asked_for = (load_text_encoder([str(path)], "lumina2", model_options=options,
                                              mmproj=mmproj)
                            for mmproj in ("auto", str(path.with_name("mmproj-encoder.gguf"))))
    assert not hasattr(text_model(alone).transformer, "visual")
    assert hasattr(text_model(asked_for).transformer, "visual")


def test_qwen3_vl_without_its_tower_reads_as_it_does_with_one(tmp_path):
    encoder, path = ALL["qwen3-vl-4b"], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        weights = random_weights(encoder)
        write_encoder(path, encoder, weights, metadata={"qwen3vl.n_deepstack_layers": 3})
        seeing = load_encoder(path, encoder)
    blind = load_encoder(path, encoder, mmproj=None)
    assert torch.equal(hidden_states(blind), hidden_states(seeing))


def test_of_qwen3_vl_32b_the_layers_that_the_host_runs_are_kept():
    weights = a_file(5120, 64)
    layers = {
        int(name.split(".")[2]) for name in arch_of(weights).convert(weights, {})
        if "layers." in name
    }
    assert layers == set(range(50))


def test_sizes_that_the_host_does_not_know_are_of_no_family():
    assert arch_of(a_file(5120, 40)) is None  # Qwen3 14B, which the host would take for a Mistral
    assert arch_of(a_file(896, 24)) is None


def tower_of(encoder):
    with small_towers(encoder):
        return {
            name: tensor for name, tensor in random_weights(encoder).items()
            if name.startswith(TOWERS)
        }


def test_towers_of_old_converters_are_the_same():
    tower = tower_of(ALL["qwen2.5-vl-7b"])
    stored = qwen_vl.qwen25_mmproj(tower)
    text = {"token_embd.weight": torch.zeros(1, 3584)}
    swapped = {
        name.replace("ffn_up", "x").replace("ffn_down", "ffn_up").replace("x", "ffn_down"): tensor
        for name, tensor in stored.items()
    }
    fused = {
        name: tensor for name, tensor in stored.items()
        if ".attn_q." not in name and ".attn_k." not in name
    }
    for name in [name for name in fused if ".attn_v." in name]:
        parts = [stored[name.replace("attn_v", f"attn_{part}")] for part in "qkv"]
        fused[name.replace("attn_v", "attn_qkv")] = torch.cat(parts)
        del fused[name]
    for form in (stored, swapped, fused):
        converted = Qwen25VL.convert(text | form, {})
        assert {name for name in converted if name.startswith("visual.")} == tower.keys()
        assert all(torch.equal(converted[name], tensor) for name, tensor in tower.items())


def test_layers_that_guess_further_tokens_are_left_out():
    names = ["blk.0.ssm_a", "blk.0.ssm_norm.weight", "blk.0.attn_qkv.weight"]
    weights = {
        name: torch.ones(128 * 3 if "qkv" in name else 128 if "norm" in name else 1)
        for name in names
    }
    drafts = {"blk.1.nextn.eh_proj.weight": torch.zeros(1), "blk.1.attn_q.weight": torch.zeros(1)}
    assert not any(
        "layers.1." in name or "nextn" in name for name in Qwen35.convert(weights | drafts, {})
    )


def test_a_tower_is_seen_through_with_its_place_in_a_larger_file_before_its_names(tmp_path):
    encoder, path = ALL["qwen3.5-0.8b"], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        weights = random_weights(encoder)
        write_encoder(path, encoder, weights)
        tower = {name: tensor for name, tensor in weights.items() if name.startswith(TOWERS)}
        stored = {
            f"text_encoders.llm.{name}": tensor for name, tensor in encoder.mmproj(tower).items()
        }
        write_gguf(tmp_path / "tower.gguf", stored, type_of=lambda name, values: "F32",
                   architecture=None)
        clip = load_encoder(path, encoder, mmproj=str(tmp_path / "tower.gguf"))
    tokens = [*TOKENS[:3], picture()]
    assert hidden_states(clip, tokens).shape[1] > len(tokens)


def test_a_family_takes_the_towers_of_its_own_kind_and_width():
    families = {
        "qwen2.5-vl-7b": Qwen25VL, "qwen3-vl-4b": Qwen3VL, "qwen3-vl-32b": Qwen3VL32B,
        "qwen3.5-2b": Qwen35
    }
    mmprojs = {name: ALL[name].mmproj(tower_of(ALL[name])) for name in families}
    for name, family in families.items():
        text = {"token_embd.weight": torch.zeros(1, ALL[name].config["hidden_size"])}
        widths = {other: family.vision_width(text, mmproj) for other, mmproj in mmprojs.items()}
        assert [other for other, pair in widths.items() if pair and pair[0] == pair[1]] == [name]
