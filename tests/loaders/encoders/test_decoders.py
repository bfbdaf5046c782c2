"""Llama, Mistral and GPT-OSS from files of llama.cpp: row order, experts, what is refused."""
import dataclasses

import comfy.sd
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import (
    error_of,
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    rounded,
    shapes_of,
    small_towers,
    text_model,
    write_encoder,
)
from families import relative_error
from pack_api import WeightFileError, is_packed, load_text_encoder, open_weights
from safetensors.torch import save_file

from featherweight.loaders.encoders.arch import ARCHS, arch_of

pytestmark = pytest.mark.usefixtures("small_models")

LLAMA, GPT_OSS = ENCODERS["llama-3-8b"], ENCODERS["gpt-oss-20b"]
EXPERTS = "layers.1.mlp.experts.down_proj.weight"


@pytest.mark.parametrize("name", ENCODERS)
def test_one_family_knows_an_encoder_whatever_architecture_the_file_names(name, tmp_path):
    encoder, path = ENCODERS[name], tmp_path / "encoder.gguf"
    with small_towers(encoder):
        weights = {name: torch.zeros(shape) for name, shape in shapes_of(encoder).items()}
    write_encoder(path, encoder, weights, "F32", architecture="pig" if "t5" in name else "t5")
    assert sum(arch.recognises(open_weights(path).state_dict()) for arch in ARCHS) == 1
    assert comfy.sd.detect_te_model(load_names(path)).name == encoder.te_model


def load_names(path):
    file, mmproj = open_weights(path), path.with_name(f"mmproj-{path.name}")
    weights = file.state_dict() | (open_weights(mmproj).state_dict() if mmproj.exists() else {})
    return arch_of(weights).convert(weights, file.metadata)


def test_rows_packed_with_k_quants_go_back_to_where_they_were(tmp_path):
    weights = random_weights(LLAMA)
    seen = write_encoder(tmp_path / "encoder.gguf", LLAMA, weights, packed_type="Q4_K")
    row_numbers = {name: torch.arange(len(values)).view(-1, 1) for name, values in weights.items()}
    stored = LLAMA.changed(row_numbers)  # where the converter puts each row
    converted = load_names(tmp_path / "encoder.gguf")
    for projection in ("q", "k"):
        name = f"model.layers.1.self_attn.{projection}_proj.weight"
        assert is_packed(converted[name])
        values = torch.from_numpy(seen[f"blk.1.attn_{projection}.weight"])
        assert torch.equal(converted[name].dequantize()[stored[name].flatten()], values)
    dense = {
        name: tensor.dequantize() if is_packed(tensor) else tensor
        for name, tensor in converted.items()
    }
    assert error_of(load_encoder(tmp_path / "encoder.gguf", LLAMA), LLAMA, dense) < 1e-4


def test_hunyuan_video_takes_llama_beside_clip(tmp_path):
    # the host takes the last but two
    encoder = dataclasses.replace(LLAMA, config={**LLAMA.config, "num_hidden_layers": 4})
    weights = random_weights(encoder)
    write_encoder(tmp_path / "llava.gguf", encoder, weights)
    clip_l = ENCODERS["clip-l"]
    save_file(random_weights(clip_l), tmp_path / "clip_l.safetensors")
    clip = load_text_encoder([str(tmp_path / "clip_l.safetensors"),
                              str(tmp_path / "llava.gguf")], "hunyuan_video",
                             model_options={**encoder.model_options,
                                            "model_config": dict(clip_l.config)})
    expected = hidden_states(host_clip(encoder, weights))
    clip.cond_stage_model.clip_l = None
    assert relative_error(hidden_states(clip), expected) < 1e-4


def test_ministral_writes_what_the_dense_model_writes(tmp_path):
    encoder = ENCODERS["ministral-3-3b"]
    weights = random_weights(encoder)
    write_encoder(tmp_path / "encoder.gguf", encoder, weights)
    written = []
    for clip in (load_encoder(tmp_path / "encoder.gguf", encoder), host_clip(encoder, weights)):
        written.append(clip.generate(clip.tokenize("a cat"), do_sample=False, max_length=4))
    assert written[0] == written[1]


@pytest.fixture
def experts_in_mxfp4(tmp_path):
    """(path of a GPT-OSS whose matrices are MXFP4, their dense values under the host's names)"""
    weights = {
        name: rounded(values, "MXFP4") if values.ndim > 1 and name.endswith("weight") else values
        for name, values in random_weights(GPT_OSS).items()
    }
    write_encoder(tmp_path / "encoder.gguf", GPT_OSS, weights, packed_type="MXFP4")
    return tmp_path / "encoder.gguf", weights


def test_experts_stay_mxfp4(experts_in_mxfp4):
    path, weights = experts_in_mxfp4
    clip = load_encoder(path, GPT_OSS)
    for block in text_model(clip).transformer.layers:
        for bank in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            assert bank.weight.params.format.name == "MXFP4"
    assert error_of(clip, GPT_OSS, weights) < 1e-4


def test_a_patch_on_experts_is_exact(experts_in_mxfp4):
    path, weights = experts_in_mxfp4
    change = torch.randn(weights[EXPERTS].shape, generator=torch.Generator().manual_seed(1)) * 0.1
    clip = load_encoder(path, GPT_OSS).clone()
    before = hidden_states(clip)
    clip.patcher.add_patches({f"gpt_oss.transformer.{EXPERTS}": ("diff", (change,))}, 1.0)
    after = hidden_states(clip)
    expected = hidden_states(host_clip(GPT_OSS, weights | {EXPERTS: weights[EXPERTS] + change}))
    assert relative_error(after, expected) < 1e-4 < relative_error(after, before)


def test_a_file_without_its_tokenizer_is_refused(tmp_path):
    encoder = dataclasses.replace(GPT_OSS, metadata={})
    write_encoder(tmp_path / "encoder.gguf", encoder, random_weights(encoder))
    with pytest.raises(WeightFileError,
                       match=r"encoder\.gguf has no tokenizer\.ggml\.tokens in its metadata"):
        load_encoder(tmp_path / "encoder.gguf", encoder)


def test_a_llama_of_another_width_is_refused(tmp_path):
    shapes = {
        "q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)
    }
    weights = {
        f"model.layers.0.self_attn.{name}.weight": torch.zeros(shape)
        for name, shape in shapes.items()
    }
    encoder = dataclasses.replace(LLAMA, changed=lambda weights: weights)
    write_encoder(tmp_path / "llama-1b.gguf", encoder, weights)
    with pytest.raises(WeightFileError, match="holds no text encoder that this ComfyUI knows"):
        load_encoder(tmp_path / "llama-1b.gguf", encoder)
