"""Gemma 2, 3 and 4: what their converters change, and the files of LTX-2."""
import dataclasses
import random
import re

import comfy.sd
import gguf
import pytest
import safetensors.torch
import torch
from comfy.text_encoders import lt
from encoders import ENCODERS
from encoders.encoder import (
    TOKENS,
    error_of,
    hidden_states,
    host_clip,
    load_encoder,
    random_weights,
    rounded,
    seeded,
    small_towers,
    text_model,
    write_encoder,
)
from families import relative_error
from pack_api import Format, WeightFileError, is_packed, load_text_encoder, open_weights

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.encoders.arch import arch_of
from featherweight.ops.layers import workspace
from featherweight.ops.tensor.row_slicing import dense, join_rows

pytestmark = pytest.mark.usefixtures("small_models")

NAMES = ["gemma-2-2b", "gemma-3-4b", "gemma-4-e4b"]


@pytest.mark.parametrize("name", NAMES)
def test_k_quants_give_the_hidden_states_of_their_values(name, tmp_path):
    encoder = ENCODERS[name]
    names = gguf.get_tensor_name_map(encoder.architecture, 64)
    with small_towers(encoder):
        weights = random_weights(encoder)
        stored = write_encoder(tmp_path / "gemma.gguf", encoder, weights, "Q4_K")
        for host_name in [host_name for host_name, values in weights.items() if values.ndim == 2]:
            weights[host_name] = torch.from_numpy(stored[names.get_name(
                host_name, try_suffixes=(".weight",))])
        clip = load_encoder(tmp_path / "gemma.gguf", encoder)
        assert error_of(clip, encoder, weights) < 1e-4


@pytest.fixture
def dequantized_values(monkeypatch):
    """How many values each call has dequantised so far."""
    counts, dequantize_into = [], Format.dequantize_into

    def count(self, tensors, out, *args, **kwargs):
        counts.append(out.numel())
        return dequantize_into(self, tensors, out, *args, **kwargs)

    monkeypatch.setattr(Format, "dequantize_into", count)
    return counts


# the second has a table for each layer too, which the host looks up only where it writes text
@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-4-e4b"])
def test_no_embedding_table_is_dequantized_while_it_is_loaded_and_a_prompt_is_encoded(
        name, tmp_path, dequantized_values):
    encoder = dataclasses.replace(ENCODERS[name],
                                  config={**ENCODERS[name].config, "vocab_size": 8192})
    with small_towers(encoder):
        write_encoder(tmp_path / "gemma.gguf", encoder, random_weights(encoder))
        clip = load_encoder(tmp_path / "gemma.gguf", encoder)
        hidden_states(clip)
    tables = {
        name: tensor for name, tensor in text_model(clip).transformer.state_dict().items()
        if "embed_tokens" in name
    }
    assert all(is_packed(table) and len(table) == 8192 for table in tables.values())
    assert max(dequantized_values) < min(table.numel() for table in tables.values())
    tokens_table = tables["model.embed_tokens.weight"]
    assert len(TOKENS) * tokens_table.shape[1] in dequantized_values


@pytest.mark.parametrize("name", NAMES)
def test_text_is_written_as_by_the_dense_model_with_the_table_dequantized_in_slices(
        name, tmp_path, dequantized_values, monkeypatch):
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 1 << 20)
    encoder = dataclasses.replace(ENCODERS[name],
                                  config={**ENCODERS[name].config, "vocab_size": 8192})
    with small_towers(encoder):
        weights = random_weights(encoder)
        write_encoder(tmp_path / "gemma.gguf", encoder, weights)
        clips = [
            load_encoder(tmp_path / "gemma.gguf", encoder),
            host_clip(encoder, weights)
        ]
    prompt = {encoder.config_of: [[(token, 1.0) for token in TOKENS]]}
    with torch.inference_mode():  # as the host runs nodes
        packed, dense = (clip.generate(prompt, do_sample=False, max_length=6) for clip in clips)
    assert packed == dense
    assert max(dequantized_values) <= 1 << 18


def test_a_table_without_the_rows_that_have_no_token_is_enough(tmp_path):
    encoder = ENCODERS["gemma-3-4b"]
    weights = random_weights(encoder)
    tokens = 251  # of 256
    write_encoder(tmp_path / "gemma.gguf", encoder, weights | {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:tokens]})
    clip = load_encoder(tmp_path / "gemma.gguf", encoder)
    assert error_of(clip, encoder, weights) < 1e-4


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-e4b"])
def test_layers_that_share_keys_and_values_need_none_of_their_own(name, tmp_path):
    encoder = ENCODERS[name]
    first_shared = encoder.config["num_hidden_layers"] - encoder.config["num_kv_shared_layers"]
    with small_towers(encoder):
        weights = random_weights(encoder)
        kept = {
            name: values for name, values in weights.items()
            if not (".self_attn." in name and name.split(".")[4] in
                    ("k_proj", "v_proj", "k_norm") and int(name.split(".")[2]) >= first_shared)
        }
        assert len(weights) - len(kept) > 9
        write_encoder(tmp_path / "gemma.gguf", encoder, kept)
        clip = load_encoder(tmp_path / "gemma.gguf", encoder)
        assert error_of(clip, encoder, weights) < 1e-4


def test_a_gemma_of_a_size_that_the_host_does_not_have_is_told(tmp_path):
    write_encoder(tmp_path / "gemma.gguf", ENCODERS["gemma-3-4b"],
                  random_weights(ENCODERS["gemma-3-4b"]))
    with pytest.raises(
            WeightFileError,
            match=r"gemma.gguf: the names .* are those of Gemma3_4B, .* the model expects"):
        load_text_encoder([str(tmp_path / "gemma.gguf")], "lumina2",
                          model_options={"gemma3_4b_model_config": {"num_hidden_layers": 6}})


def test_a_gemma_4_with_experts_is_not_taken_for_another(tmp_path):
    encoder = ENCODERS["gemma-4-31b"]
    with small_towers(encoder):
        write_encoder(tmp_path / "gemma.gguf", encoder, random_weights(encoder))
    weights = open_weights(tmp_path / "gemma.gguf").state_dict()
    assert arch_of(weights | {"blk.0.ffn_gate_inp.weight": torch.zeros(4, 256)}) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_q_k_and_v_in_one_tensor_gives_the_same(name, tmp_path):
    encoder = ENCODERS[name]
    with small_towers(encoder):
        weights = random_weights(encoder)
        write_encoder(tmp_path / "apart.gguf", encoder, weights)
        apart = open_weights(tmp_path / "apart.gguf").state_dict()
        fused = {}
        for name, tensor in apart.items():
            if not re.search(r"attn_[qkv]\.weight", name):
                fused[name] = tensor
            elif "attn_q." in name:
                parts = [apart[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
                fused[name.replace("attn_q", "attn_qkv")] = join_rows(parts)
        family = arch_of(fused)
        converted, expected = family.convert(fused, {}), family.convert(apart, {})
    assert len(fused) < len(apart) and converted.keys() == expected.keys()
    assert all(torch.equal(dense(converted[name]), dense(expected[name])) for name in expected)


def test_a_file_without_the_vocabulary_is_told(tmp_path):
    encoder = dataclasses.replace(ENCODERS[random.choice(NAMES)], metadata={})
    with small_towers(encoder):
        write_encoder(tmp_path / "gemma.gguf", encoder, random_weights(encoder))
    with pytest.raises(WeightFileError, match="gemma.gguf has no tokenizer.ggml.* in its metadata"):
        load_text_encoder([str(tmp_path / "gemma.gguf")], encoder.clip_type)


@pytest.fixture
def ltx(monkeypatch):
    """Gemma 3 12B, and the projection of LTX-2.3, whose sizes are fixed in the host, as small: 7
    hidden states of 256."""
    projection = lt.DualLinearProjection
    monkeypatch.setattr(lt, "DualLinearProjection",
                        lambda *sizes, **options: projection(7 * 256, 64, 32, **options))
    encoder = ENCODERS["gemma-3-12b"]
    with small_towers(encoder):
        yield encoder


def projection_weights():
    shapes = {}
    for kind, width in (("video", 64), ("audio", 32)):
        layer = f"text_embedding_projection.{kind}_aggregate_embed"
        shapes |= {f"{layer}.weight": (width, 7 * 256), f"{layer}.bias": (width,)}
    return {
        name: rounded(values) if values.ndim == 2 else values
        for name, values in seeded(shapes).items()
    }


def encoded(clip):
    return clip.encode_from_tokens({"gemma3_12b": [[(token, 1.0) for token in TOKENS]]})


@pytest.mark.parametrize("first", ["gemma", "projection"])
@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_the_projection_of_ltx_2_comes_from_a_second_file(ending, first, ltx, tmp_path):
    weights, projection = random_weights(ltx), projection_weights()
    paths = [tmp_path / "gemma.gguf", tmp_path / f"projection.{ending}"]
    write_encoder(paths[0], ltx, weights)
    if ending == "gguf":
        write_gguf(paths[1], projection, lambda name, values: "Q8_0"
                   if values.ndim == 2 else "F32", None)
    else:
        safetensors.torch.save_file(projection, paths[1])
    paths.sort(key=lambda path: path.stem != first)
    clip = load_text_encoder(list(map(str, paths)), "ltxv", model_options=ltx.model_options)
    assert is_packed(
        clip.cond_stage_model.text_embedding_projection.audio_aggregate_embed.weight
    ) == (ending == "gguf")
    dense = comfy.sd.load_text_encoder_state_dicts([
        weights |
        {name: torch.zeros(shape)
         for name, shape in ltx.markers.items() if name not in weights} | dict(ltx.extra),
        projection
    ], clip_type=comfy.sd.CLIPType.LTXV, model_options=ltx.model_options)
    assert relative_error(encoded(clip), encoded(dense)) < 1e-4


def test_the_projection_of_ltx_2_may_lie_in_the_whole_checkpoint(ltx, tmp_path):
    write_encoder(tmp_path / "gemma.gguf", ltx, random_weights(ltx))
    projection = projection_weights()
    blocks = {
        f"transformer_blocks.{index}.attn2.to_k.weight": torch.zeros(64, 64) for index in range(6)
    }
    model = {"adaln_single.emb.timestep_embedder.linear_1.bias": torch.zeros(64), **blocks}
    checkpoint = projection | {
        f"model.diffusion_model.{name}": values for name, values in model.items()
    }
    safetensors.torch.save_file(checkpoint, tmp_path / "ltx-2.safetensors")
    clip = load_text_encoder([str(tmp_path / "gemma.gguf"),
                              str(tmp_path / "ltx-2.safetensors")], "ltxv",
                             model_options=ltx.model_options)
    loaded = clip.cond_stage_model.state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in projection.items())
