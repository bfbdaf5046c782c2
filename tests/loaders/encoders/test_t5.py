"""T5 and its relatives: what files hold beside the encoder, and the encoders that load beside
another one only."""
import dataclasses

import gguf
import pytest
import torch
from comfy.sd import CLIPType, load_text_encoder_state_dicts
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.omnigen2 import Qwen25_3BModel
from encoders import ENCODERS
from encoders.encoder import (
    TOKENS,
    hidden_states,
    host_clip,
    in_gguf_names,
    load_encoder,
    random_weights,
    rounded,
    seeded,
    write_encoder,
)
from encoders.t5 import T5_SMALL, spiece_model
from families import relative_error
from pack_api import WeightFileError, is_packed, load_text_encoder, open_weights, packed_layers
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.encoders.arch import ARCHS, arch_of
from featherweight.loaders.encoders.saved_tokenizer import saved_tokenizer
from featherweight.loaders.inspect import inspect
from featherweight.loaders.models import text_encoder

pytestmark = pytest.mark.usefixtures("small_models")

# What other encoder a type wants, the options that shrink both (and leave out Qwen's vision tower),
# the tensors the host knows the other one and this one by, and what this one needs.
BYT5 = (
    "hunyuan_image",
    {
        "qwen25_7b_class": Qwen25_3BModel,
        "qwen25_7b_model_config": {
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 256,
        },
        "_model_config": {**T5_SMALL, "num_heads": 6},
    },
    {"model.layers.0.self_attn.k_proj.bias": (512,)},
    {"encoder.block.0.layer.0.SelfAttention.k.weight": (384, 256)},
    {},
)
JINA = (
    "newbie",
    {
        "_model_config": {
            "num_hidden_layers": 3,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "vocab_size": 256,
        }
    },
    {
        "model.layers.0.post_feedforward_layernorm.weight": (256,),
        "model.layers.0.self_attn.q_norm.weight": (256,),
    },
    {"model.encoder.layers.0.mixer.Wqkv.weight": (768, 256)},
    {"spiece_model": spiece_model()},
)


@pytest.mark.parametrize(
    ("architecture", "packed_type"),
    [("pig", "Q4_K"), (None, "Q6_K"), ("t5", "IQ4_XS"), ("llama", "F16")],
)
def test_the_architecture_a_file_names_does_not_matter(architecture, packed_type, tmp_path):
    encoder = ENCODERS["t5-xxl"]
    weights = random_weights(encoder) | {
        name: torch.zeros(shape) for name, shape in encoder.markers.items()
    }
    seen = write_gguf(tmp_path / "t5.gguf", in_gguf_names(weights, encoder.architecture),
                      lambda name, values: packed_type if values.ndim == 2 else "F32", architecture)
    names = dict(zip(weights, seen))
    expected = host_clip(encoder,
                         {ours: torch.from_numpy(seen[theirs]) for ours, theirs in names.items()})
    found = load_encoder(tmp_path / "t5.gguf", encoder)
    assert relative_error(hidden_states(found), hidden_states(expected)) < 1e-4


def test_of_a_whole_model_only_the_encoder_is_used(tmp_path, caplog):
    encoder = ENCODERS["t5-base-gated"]
    weights = random_weights(encoder)
    write_encoder(tmp_path / "t5.gguf", encoder, weights)
    file = open_weights(tmp_path / "t5.gguf").state_dict()
    decoder = {
        "dec.blk.0.attn_q.weight": torch.ones(256, 256), "dec.output_norm.weight": torch.ones(256),
        "output.weight": torch.ones(256, 256)
    }
    found = arch_of(file | decoder).convert(file | decoder, {})
    assert set(found) == set(weights)
    of_transformers = {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(256, 256),
        "lm_head.weight": torch.ones(1)
    }
    assert set(arch_of(weights).convert(weights | of_transformers, {})) == set(weights)


@pytest.mark.parametrize(
    "names", [["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]]
)
def test_the_embedding_goes_by_either_of_its_names(names):
    weights = dict.fromkeys([*names, "encoder.block.0.layer.0.SelfAttention.q.weight"],
                            torch.zeros(8, 8))
    assert set(arch_of(weights).convert(weights, {})) == {
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    }


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("model.", []),
        ("", []),
        (
            "model.",
            ["model.decoder.layers.0.pre_self_attn_layernorm.weight", "lm_head.out_proj.weight"],
        ),
    ],
)
def test_t5_gemma_is_taken_as_a_whole_or_as_an_encoder(prefix, others):
    weights = {name: torch.ones(1) for name in random_weights(ENCODERS["t5-gemma"])}
    stored = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()}
    stored |= dict.fromkeys(others, torch.ones(1))
    assert [arch.__name__ for arch in ARCHS if arch.recognises(stored)] == ["T5Gemma"]
    assert set(arch_of(stored).convert(stored, {})) == set(weights)


@pytest.mark.parametrize(
    "name", ["umt5-xxl of transformers", "umt5-base of transformers", "t5-gemma"]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16, torch.float32])
def test_the_tokenizer_in_a_file_is_read_whatever_type_a_converter_gave_it(name, dtype):
    encoder = ENCODERS[name]
    weights = {
        "spiece_model": spiece_model().to(dtype), **{
            name: torch.zeros(shape) for name, shape in {
                "shared.weight": (100_032, 1),
                "encoder.block.0.layer.0.SelfAttention.q.weight": (1, 1), **encoder.markers
            }.items()
        }
    }
    found = arch_of(weights).tokenizer(weights, {})["spiece_model"]
    assert found.dtype == torch.uint8 and torch.equal(found, spiece_model())


@pytest.mark.parametrize("name", ["umt5-xxl", "umt5-xxl of transformers"])
def test_prompts_are_tokenized_by_the_tokenizer_in_the_file(name, tmp_path):
    encoder = ENCODERS[name]
    weights = random_weights(encoder)
    write_encoder(tmp_path / "umt5.gguf", encoder, weights)
    clips = load_encoder(tmp_path / "umt5.gguf", encoder), host_clip(encoder, weights)
    found, expected = (clip.encode_from_tokens(clip.tokenize("a (red:1.2) fox")) for clip in clips)
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    "place", ["text_encoder/spiece.model", "tokenizer/spiece.model", "tokenizer/tokenizer.model"]
)
@pytest.mark.parametrize("name", ["umt5-base", "t5-base"])
def test_the_tokenizer_of_a_package_is_found(name, place, tmp_path):
    encoder = ENCODERS[name]
    weights = {
        "shared.weight": torch.zeros(encoder.config["vocab_size"], 1),
        "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1, 1)
    }
    for folder in ("text_encoder", "tokenizer"):
        (tmp_path / folder).mkdir()
    (tmp_path / place).write_bytes(spiece_model().numpy().tobytes())
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    save_file(weights, tmp_path / "text_encoder" / "model.safetensors")
    file = open_weights(tmp_path / "text_encoder")
    found, arch = file.state_dict() | saved_tokenizer(file.path), arch_of(weights)
    assert set(arch.convert(found, {})) == set(weights)
    tokenizer = arch.tokenizer(found, {})
    assert (
        torch.equal(tokenizer["spiece_model"], spiece_model())
        if name == "umt5-base"
        else tokenizer == {}
    )


@pytest.mark.parametrize("kind", [BYT5, JINA], ids=["byt5-small", "jina-clip-2"])
def test_an_encoder_that_loads_beside_another_gives_the_hidden_states_of_the_dense_one(
        kind, tmp_path):
    clip_type, options, other, markers, extra = kind
    host_type, options = getattr(CLIPType, clip_type.upper()), {**options, "dtype": torch.float32}
    markers, other = ({name: torch.zeros(shape) for name, shape in shapes.items()}
                      for shapes in (markers, other))
    state_dicts = [other | {"spiece_model": spiece_model()}, markers | extra]

    def encoders_of(clip):
        return [
            module for module in clip.cond_stage_model.modules() if isinstance(module, SDClipModel)
        ]

    def encoder_of(clip):
        return encoders_of(clip)[-1]

    empty = load_text_encoder_state_dicts([dict(part) for part in state_dicts], clip_type=host_type,
                                          model_options=options)
    others, weights = (
        {name: rounded(value) if value.ndim == 2 else value for name, value in seeded({
            name: value.shape for name, value in encoder.transformer.state_dict().items()
        }).items()}
        for encoder in encoders_of(empty))
    state_dicts[0] |= others
    dense = load_text_encoder_state_dicts([state_dicts[0], weights | extra], clip_type=host_type,
                                          model_options=options)
    stored = in_gguf_names(weights, gguf.MODEL_ARCH.T5ENCODER) if not extra else weights | extra
    write_gguf(tmp_path / "encoder.gguf", stored, lambda name, values: "Q8_0"
               if values.ndim == 2 else "F32", None)
    save_file(state_dicts[0], tmp_path / "other.safetensors")
    clip = load_text_encoder([str(tmp_path / "encoder.gguf"),
                              str(tmp_path / "other.safetensors")], clip_type,
                             model_options=options)
    with torch.inference_mode():
        found, expected = (encoder_of(part)([TOKENS])[0] for part in (clip, dense))
    assert relative_error(found, expected) < 1e-4
    matrices = [value for value in encoder_of(clip).transformer.parameters() if value.ndim == 2]
    assert all(is_packed(value) or value.nbytes <= packed_layers.PLAIN_TABLE_BYTES
               for value in matrices if value.shape[-1] % 32 == 0)


@pytest.mark.parametrize("name", ["umt5-xxl", "umt5-xxl of transformers"])
def test_a_umt5_without_its_tokenizer_is_refused(name, tmp_path):
    encoder = dataclasses.replace(ENCODERS[name], metadata={}, extra={})
    write_encoder(
        tmp_path / "umt5.gguf", encoder, {
            "shared.weight": torch.zeros(100_032, 32),
            "encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(32, 32)
        })
    with pytest.raises(WeightFileError,
                       match="umt5.gguf has no tokenizer.ggml.model in its metadata"):
        load_encoder(tmp_path / "umt5.gguf", ENCODERS[name])


def test_a_t5_for_which_the_type_has_no_use_is_refused(tmp_path):
    write_encoder(tmp_path / "t5.gguf", ENCODERS["t5-xxl"], random_weights(ENCODERS["t5-xxl"]))
    with pytest.raises(WeightFileError, match="t5.gguf is T5-XXL; wan wants UMT5-XXL"):
        load_text_encoder([str(tmp_path / "t5.gguf")], "wan",
                          model_options=ENCODERS["t5-xxl"].model_options)


IN_NAMES_OF_WAN = {
    "shared": "token_embedding", "encoder.final_layer_norm": "norm", "encoder.block": "blocks",
    "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2"}


def in_names_of_wan(encoder):
    """Its weights under the names of Wan-Video/Wan2.1, wan/modules/t5.py, and under the host's."""
    weights = random_weights(encoder) | {
        name: torch.zeros(shape) for name, shape in encoder.markers.items()}
    renamed = {}
    for name, value in weights.items():
        for old, new in IN_NAMES_OF_WAN.items():
            name = name.replace(old, new)
        renamed[name] = value
    assert len(renamed) == len(weights) and not any("layer" in name for name in renamed)
    return renamed, weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("pack_to", [None, "Q4_K"])
def test_umt5_under_wans_names_says_which_file_to_take_before_it_is_packed(
        pack_to, dtype, suffix, tmp_path, monkeypatch):
    """Its file has no tokenizer, which ComfyUI does not have either."""
    monkeypatch.setattr(text_encoder, "pack_weights", None)
    weights, _ = in_names_of_wan(ENCODERS["umt5-xxl of transformers"])
    path = str(tmp_path / f"umt5-xxl-enc{suffix}")
    tensors = {name: (value.to(dtype) if value.ndim > 1 else value) for name, value in
               weights.items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert inspect(path)[0].title == f"umt5-xxl-enc{suffix} is a text encoder: UMT5-XXL."
    with pytest.raises(WeightFileError) as error:
        load_text_encoder([path], "wan", pack_to=pack_to)
    assert str(error.value).startswith(
        f"umt5-xxl-enc{suffix} is UMT5-XXL without its tokenizer, and ComfyUI does not have it.")
    assert "such as umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled" in str(error.value)


def test_umt5_under_wans_names_with_its_tokenizer_writes_the_same_states(tmp_path):
    encoder = ENCODERS["umt5-xxl of transformers"]
    for name, weights in zip(("wan", "host"), in_names_of_wan(encoder)):
        folder = tmp_path / name
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "spiece.model").write_bytes(spiece_model().numpy().tobytes())
    expected, found = (hidden_states(load_encoder(tmp_path / name, encoder))
                       for name in ("host", "wan"))
    assert torch.equal(found, expected)
