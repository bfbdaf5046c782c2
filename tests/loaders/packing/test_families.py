"""What may be packed in a model of each family, and which types fit."""
import re

import families as models
import gguf
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import host_clip, small_towers, text_model
from pack_api import FORMATS, GGML_FORMATS

from featherweight.loaders.families import FAMILIES, rules_for
from featherweight.loaders.packing_rules import (
    GENERAL_RULES,
    half_type,
    with_fallback,
)
from featherweight.ops.packing.pack_types import TYPES, pack_type

RULES = [family.packing for family in FAMILIES if family.packing]
# The family of these rules that each of the host's models is of; "general" for those that nobody
# writes as GGUF yet.
FAMILY_OF = {
    "flux-schnell": "flux", "flux-dev": "flux", "flux2": "flux2", "flux2-klein": "flux2",
    "longcat-image": "flux",
    "chroma": "chroma", "chroma-radiance": "chroma", "sd3.5": "sd3", "sd1.5": "sd1", "sdxl": "sdxl",
    "wan2.1-t2v": "wan", "wan2.1-i2v": "wan", "wan2.1-vace": "wan", "wan2.2-ti2v": "wan",
    "hunyuan-video": "hyvid", "hunyuan-image": "hyvid", "hunyuan-video-1.5": "hyvid",
    "ltxv": "ltxv", "ltx-2": "ltxv", "aura-flow": "aura", "lumina2": "lumina2",
    "z-image": "lumina2", "qwen-image": "qwen_image", "hidream": "hidream", "cosmos": "cosmos",
    "cosmos-predict2": "cosmos", "anima": "cosmos", "lens": "lens", "omnigen2": "omnigen2",
    "boogu": "omnigen2"
}
# Layers that map a model's inputs and outputs, by the lists of the field's converters.
NEVER_PACKED = {
    "flux-dev": [
        "txt_in.weight", "img_in.weight", "time_in.in_layer.weight", "vector_in.out_layer.weight",
        "guidance_in.in_layer.weight", "final_layer.linear.weight"
    ], "sd3.5": [
        "final_layer.linear.weight", "context_embedder.weight", "t_embedder.mlp.0.weight",
        "y_embedder.mlp.2.weight", "pos_embed"
    ], "sdxl": [
        "time_embed.0.weight", "label_emb.0.0.weight", "input_blocks.0.0.weight", "out.2.weight"
    ], "wan2.1-i2v": [
        "blocks.0.modulation", "patch_embedding.weight", "text_embedding.0.weight",
        "time_projection.1.weight", "time_embedding.2.weight", "img_emb.proj.1.weight",
        "head.head.weight", "head.modulation"
    ], "ltxv": [
        "adaln_single.linear.weight", "caption_projection.linear_1.weight", "patchify_proj.weight",
        "proj_out.weight", "transformer_blocks.0.scale_shift_table"
    ], "lumina2": [
        "t_embedder.mlp.0.weight", "x_embedder.weight", "cap_embedder.1.weight",
        "final_layer.linear.weight", "context_refiner.0.attention.qkv.weight",
        "noise_refiner.0.attention.qkv.weight"
    ], "hidream": [
        "p_embedder.pooled_embedder.linear_1.weight",
        "t_embedder.timestep_embedder.linear_1.weight", "x_embedder.proj.weight",
        "final_layer.linear.weight", "caption_projection.0.linear.weight",
        "double_stream_blocks.0.block.ff_i.gate.weight"
    ], "hunyuan-video": [
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight", "img_in.proj.weight",
        "time_in.in_layer.weight", "vector_in.in_layer.weight", "guidance_in.in_layer.weight",
        "final_layer.linear.weight"
    ]
}


@pytest.fixture(scope="module", params=FAMILY_OF)
def model(request):
    family = models.FAMILIES[request.param]
    weights = models.host_model(family, family.config, "meta").state_dict()
    return request.param, {name: tuple(value.shape) for name, value in weights.items()}


def test_the_family_of_each_model_is_told_by_its_names(model):
    name, shapes = model
    assert rules_for(shapes).name == FAMILY_OF[name]
    assert any(rules_for(shapes).may_be_packed(*tensor) for tensor in shapes.items())


def test_every_family_here_is_one_of_the_hosts():
    assert {rules.name for rules in RULES} - {"text encoder"} == set(FAMILY_OF.values())


@pytest.mark.parametrize("name", NEVER_PACKED)
def test_first_and_last_layers_are_never_packed(name):
    shapes = {
        key: tuple(value.shape) for key, value in models.host_model(
            models.FAMILIES[name], models.FAMILIES[name].config, "meta").state_dict().items()
    }
    family = rules_for(shapes)
    for layer in NEVER_PACKED[name]:
        wide = (4096,) * len(shapes[layer])  # the sizes of a test must not be what keeps it
        assert not family.may_be_packed(layer, wide), layer


def test_vectors_small_ones_convolutions_and_biases_are_never_packed(model):
    _, shapes = model
    family = rules_for(shapes)
    packed = [name for name, shape in shapes.items() if family.may_be_packed(name, shape)]
    assert all(
        len(shapes[name]) == 2 and shapes[name][0] * shapes[name][1] > 1024 for name in packed)
    assert not any(name.endswith((".bias", "scale_shift_table", "modulation")) for name in packed)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_text_encoders_pack_their_blocks_and_lookup_table(name):
    with small_towers(ENCODERS[name]):
        clip = host_clip(ENCODERS[name], {})
    shapes = {
        key: tuple(value.shape) for key, value in text_model(clip).transformer.state_dict().items()
    }
    family = rules_for(shapes)
    packed = {
        key for key, shape in shapes.items() if family.may_be_packed(key, (4096,) * len(shape))
    }
    assert family.name == "text encoder"
    assert any(
        re.search(r"(embed_tokens|shared|token_embedding|word_embeddings)\.weight$", key)
        for key in packed)
    assert any(
        re.search(r"\.\d+\..*(q|qkv|q_proj|query|Wqkv|in_proj)\.weight$", key)
        for key in packed), list(shapes)
    assert not any(re.search(r"visual|vision|relative_attention_bias|norm", key) for key in packed)


def test_what_is_kept_is_float32_where_it_is_small_and_16_bits_elsewhere():
    flux, sdxl, wan = (next(rules for rules in RULES if rules.name == name)
                       for name in ("flux", "sdxl", "wan"))
    assert flux.exact_type("img_in.weight", (3072, 64), "BF16") == "BF16"
    assert flux.exact_type("img_in.bias", (3072,), "BF16") == "F32"
    assert flux.exact_type("x.weight", (32, 32), "F16") == "F32"
    assert sdxl.exact_type("input_blocks.1.0.in_layers.2.weight", (320, 320, 3, 3), "BF16") == "F16"
    assert wan.exact_type("patch_embedding.weight", (1536, 16, 1, 2, 2), "BF16") == "BF16"
    assert wan.exact_type("blocks.0.modulation", (1, 6, 1536), "BF16") == "F32"


def test_an_unknown_model_packs_its_numbered_blocks_only():
    shapes = {
        "stages.3.mix.weight": (512, 512), "time_embed.0.weight": (512, 512),
        "entry.weight": (512, 512), "stages.3.conv.weight": (512, 512, 3, 3),
        "stages.3.norm.weight": (512,), "final.1.weight": (512, 512)
    }
    assert rules_for(shapes) is GENERAL_RULES
    assert [name for name in shapes if GENERAL_RULES.may_be_packed(name, shapes[name])] == [
        "stages.3.mix.weight"
    ]


def test_what_takes_a_types_place_is_as_in_llama_cpp():
    """llama-quant.cpp, tensor_type_fallback; here for all K-quants and IQ4_XS, of which ggml's
    tables say the blocks."""
    fallbacks = {name: each.fallback for name, each in TYPES.items() if each.fallback}
    assert fallbacks == {
        "Q2_K": "IQ4_NL",
        "Q3_K": "IQ4_NL",
        "IQ4_XS": "IQ4_NL",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
    }
    for name, other in fallbacks.items():
        (block, size), (narrow, larger) = (gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
                                           for kind in (name, other))
        assert (block, narrow) == (256, 32) and larger / narrow > size / block


@pytest.mark.parametrize("name", [*(name for name, each in TYPES.items() if each.fallback), "Q4_0"])
def test_rows_that_blocks_do_not_divide_take_the_next_type(name):
    assert with_fallback(name, (8, 256)) == name
    assert with_fallback(name, (8, 96)) == (pack_type(name).fallback or name)
    assert (
        with_fallback(name, (8, 100)) == "F16" and with_fallback(name, (8, 100), "BF16") == "BF16"
    )
    assert TYPES["NF4"].takes((8, 100))


@pytest.mark.parametrize("packed", GGML_FORMATS.values(), ids=lambda packed: packed.name)
def test_sizes_are_those_of_gguf(packed):
    if packed.ggml_type not in set(gguf.GGMLQuantizationType):
        pytest.skip("the installed gguf package does not know the type")
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(packed.ggml_type)]
    assert pack_type(packed.name).nbytes((3, 512)) == 3 * 512 // block * size


def test_nf4_counts_its_scales():
    assert pack_type("NF4").nbytes((3, 100)) == 150 + 4 * 5
    assert FORMATS["NF4"].block_length == 64


def test_the_16_bit_type_has_the_range_of_its_source():
    assert {half_type(dtype) for dtype in (torch.float16, torch.float32)} == {"F16"}
    assert {
        half_type(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    } == {"BF16"}
