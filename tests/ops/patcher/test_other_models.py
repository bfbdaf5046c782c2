"""LoRA on packed text encoders and on UNets with packed convolutions, under the names their LoRAs
have."""
import dataclasses

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from families import FAMILIES, inputs, random_weights
from patched_models import (
    LIMIT,
    adapter,
    error_by_effect,
    lora_for,
    packed_anyhow,
    packed_layers,
    relative,
    run,
)

from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.patcher import PackedPatcher, adopt

pytestmark = pytest.mark.usefixtures("small_models")


def packed_state_dict(values, format_name, block):
    """(packed, dense) state dicts: every matrix and kernel whose values fill blocks is packed."""
    packed, dense = {}, {}
    for seed, (name, value) in enumerate(values.items()):
        packed[name] = dense[name] = value
        if value.ndim > 1 and value.numel() % block == 0 and name.endswith(".weight"):
            packed[name], dense[name] = packed_anyhow(value, format_name, seed)
    return packed, dense


# --- UNets: LCM-LoRA and its kind patch convolutions too ---


@pytest.fixture(scope="module", params=["sd1.5", "sdxl"])
def unets(request):
    family = FAMILIES[request.param]
    packed, dense = packed_state_dict(random_weights(family), "Q8_0", 32)
    patchers = []
    for state_dict, options in ((packed, {"custom_operations": packed_operations()}), (dense, {})):
        state_dict = {f"model.diffusion_model.{name}": value for name, value in state_dict.items()}
        patchers.append(comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options))
    # noise, more than picture
    return adopt(patchers[0]), patchers[1], dense, inputs(family) | {"t": torch.tensor([14.0])}


def lcm_lora(patcher, values, kind="lora", layers=None, **options):
    """A LoRA under diffusers' names in kohya's spelling, as LCM-LoRA and LyCORIS have them."""
    names = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    lora = {}
    for seed, (name, target) in enumerate(names.items()):
        if target in values and values[target].ndim > 1 and (layers is None or layers in target):
            for suffix, tensor in adapter(kind, values[target], seed, **options).items():
                lora[
                    f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.{suffix}"] = tensor
    return lora


@pytest.mark.parametrize(("unets", "kind"), [
    pytest.param(name, kind, marks=pytest.mark.heavy
                 if name == "sdxl" and kind in ("loha", "lokr", "dora") else ())
    for name in ("sd1.5", "sdxl") for kind in ("lora", "locon", "loha", "lokr", "dora")
], indirect=["unets"])
def test_loras_of_a_unet_with_packed_convolutions(unets, kind):
    packed, dense, values, arguments = unets
    lora = lcm_lora(packed, values, kind, size=0.15)
    assert any(".lora_mid" in name for name in lora) == (kind == "locon")
    assert any("resnets_0_conv1." in name for name in lora) and any(
        "attn2_to_k." in name for name in lora
    )
    without, count = run(dense, arguments), len(packed_layers(packed))
    outputs = []
    for patcher in (packed, dense):
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)
        patched, _ = comfy.sd.load_lora_for_models(patched, None,
                                                   lcm_lora(packed, values, size=0.1), 0.5, 0)
        outputs.append(run(patched, arguments))
    assert error_by_effect(*outputs, without) < LIMIT
    assert relative(run(packed, arguments), without) < 1e-6
    assert len(packed_layers(packed)) == count and any(
        layer.weight.ndim == 4 for layer in packed_layers(packed)
    )


# --- text encoders ---


WIDTH = 128
SMALL = {
    "num_hidden_layers": 3, "hidden_size": WIDTH, "num_attention_heads": 2,
    "intermediate_size": 4 * WIDTH
}


@pytest.fixture(scope="module")
def clips():
    encoder = dataclasses.replace(ENCODERS["clip-l"], config=SMALL, markers={
        "text_model.encoder.layers.0.mlp.fc1.weight": (4 * WIDTH, WIDTH)})
    packed, dense = packed_state_dict(encoder_weights(encoder), "Q8_0", 32)
    result = []
    sizes = {"model_config": dict(SMALL), "dtype": torch.float32}  # the host may add to it
    for state_dict, options in ((packed, {"custom_operations": packed_operations()}), (dense, {})):
        result.append(
            comfy.sd.load_text_encoder_state_dicts([state_dict],
                                                   clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
                                                   model_options=options | sizes))
    adopt(result[0].patcher)
    return (*result, dense)


def te_lora(values, seed=0, prefix="lora_te", **options):
    layers = {name: value for name, value in values.items() if ".layers." in name}
    return lora_for(layers, seed=seed,
                    layer_name=lambda name: f"{prefix}_" + name.replace(".", "_"), **options)


def encode(clip, text="a red fox"):
    cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return torch.cat([cond.flatten(), pooled.flatten()])


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_text_encoder_loras(clips, prefix):
    packed, dense, values = clips
    count = len(packed_layers(packed.patcher))
    without = encode(dense)
    assert relative(encode(packed), without) < 1e-6
    first, second = te_lora(values, 1, prefix, size=0.2), te_lora(values, 2, prefix, size=0.2)
    for stack in ([(first, 1.0)], [(first, 0.4)], [(first, 0.4), (second, -0.8)]):
        outputs = []
        for clip in (packed, dense):
            for lora, strength in stack:
                _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)
            outputs.append(encode(clip))
        assert isinstance(clip.patcher, PackedPatcher) == (
            clip.patcher.model is packed.patcher.model
        )
        assert error_by_effect(*outputs, without) < LIMIT
        assert len(packed_layers(packed.patcher)) == count
    assert relative(encode(packed), without) < 1e-6


def test_a_lora_on_a_packed_embedding(clips):
    packed, dense, values = clips
    lora = {
        f"text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.{suffix}": tensor
        for suffix, tensor in adapter(
            "lora", values["text_model.embeddings.token_embedding.weight"], 1, size=1.0).items()
    }
    without, outputs = encode(dense), []
    for clip in (packed, dense):
        _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)
        outputs.append(encode(clip))
    assert error_by_effect(*outputs, without) < LIMIT


def test_an_embedding_in_the_prompt_with_a_lora_on_the_packed_text_encoder(clips, tmp_path):
    packed, dense, values = clips
    comfy.utils.save_torch_file(
        {"clip_l": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.02},
        str(tmp_path / "my_style.safetensors"))
    lora, outputs = te_lora(values, 1), []
    for clip in (packed, dense):
        _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.5)
        clip.tokenizer.clip_l.embedding_directory = str(tmp_path)
        outputs.append((encode(clip, "a fox in embedding:my_style"), encode(clip, "a fox in")))
    assert relative(outputs[0][0], outputs[1][0]) < 1e-5
    assert relative(outputs[1][0], outputs[1][1]) > 1e-3  # the embedding is found, and matters


def test_hooks_on_a_text_encoder_with_a_schedule(clips):
    from comfy_extras.nodes_hooks import SetClipHooks

    packed, dense, values = clips
    first, second = te_lora(values, 1, size=0.2), te_lora(values, 2, size=0.2)
    without = [encode(dense)] * 3
    results = []
    for clip in (packed, dense):
        _, clip = comfy.sd.load_lora_for_models(None, clip, first, 0, 0.5)
        hooks = comfy.hooks.create_hook_lora(lora=second, strength_model=0.0, strength_clip=0.8)
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((1.0, 0.0), (0.2, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
        hooked, = SetClipHooks().apply_hooks(clip, apply_to_conds=False, schedule_clip=True,
                                             hooks=hooks)
        scheduled = hooked.encode_from_tokens_scheduled(hooked.tokenize("a red fox"))
        assert len(scheduled) == 2
        outputs = [
            torch.cat([cond.flatten(), rest["pooled_output"].flatten()]) for cond, rest in scheduled
        ]
        results.append([*outputs, encode(clip)])
    for actual, expected, base in zip(*results, without):
        assert error_by_effect(actual, expected, base) < LIMIT
    assert relative(results[0][0], results[0][1]) > 0.02
    assert relative(encode(packed), without[0]) < 1e-6


@pytest.mark.parametrize("loaded", [False, True])
def test_hooks_on_a_text_encoder_for_the_whole_prompt(clips, loaded):
    from comfy_extras.nodes_hooks import SetClipHooks

    packed, dense, values = clips
    without, results = encode(dense), []
    for clip in (packed, dense):
        comfy.model_management.unload_all_models()
        if loaded:
            encode(clip)
        _, clip = comfy.sd.load_lora_for_models(None, clip, te_lora(values, 1, size=0.2), 0, 0.5)
        hooks = comfy.hooks.create_hook_lora(lora=te_lora(values, 2, size=0.2), strength_model=0.0,
                                             strength_clip=0.8)
        hooked, = SetClipHooks().apply_hooks(clip, apply_to_conds=False, schedule_clip=False,
                                             hooks=hooks)
        results.append([encode(hooked), encode(clip), encode(hooked)])
    for actual, expected in zip(*results):
        assert error_by_effect(actual, expected, without) < LIMIT
    assert relative(results[0][0], results[0][1]) > 0.1


def test_a_saved_text_encoder_is_dense_with_its_patches_in_it(clips):
    packed, dense, values = clips
    lora = te_lora(values, 1, size=0.2)
    saved = []
    for clip in (packed, dense):
        _, clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.7)
        clip.load_model()
        saved.append(clip.state_dict_for_saving())
    assert saved[0].keys() == saved[1].keys()
    for name in saved[1]:
        if ".layers.0." in name or "token_embedding" in name:
            assert torch.allclose(saved[0][name].to("cpu"), saved[1][name].to("cpu"),
                                  atol=1e-5), name
