"""LoRA on packed text encoders and on UNets with packed convolutions, under the names their LoRAs
have."""
import dataclasses

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from families import FAMILIES, inputs, random_weights
from pack_api import packed_operations
from patched_models import (
    LIMIT,
    adapter,
    error_by_effect,
    lora_for,
    packed_anyhow,
    packed_layers,
    patched,
    relative,
    run,
)
from small_encoders import patched_clip

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


def loaded(load, values, prefix=""):
    """(the packed model, the host's dense one of the same values, these values); load: state dict,
    the host's options -> a model."""
    packed, dense = packed_state_dict(values, "Q8_0", 32)
    models = [load({f"{prefix}{name}": value for name, value in state_dict.items()}, options)
              for state_dict, options in (
                  (packed, {"custom_operations": packed_operations()}), (dense, {}))]
    adopt(getattr(models[0], "patcher", models[0]))
    return (*models, dense)


# --- UNets: LCM-LoRA and its kind patch convolutions too ---


@pytest.fixture(scope="module", params=["sd1.5", "sdxl"])
def unets(request):
    family = FAMILIES[request.param]

    def load(state_dict, options):
        return comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options)

    # noise, more than image
    arguments = inputs(family) | {"t": torch.tensor([14.0])}
    return (*loaded(load, random_weights(family), "model.diffusion_model."), arguments)


def lcm_lora(patcher, values, kind="lora", **options):
    """A LoRA under diffusers' names in kohya's spelling, as LCM-LoRA and LyCORIS have them."""
    names = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    return {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.{suffix}": tensor
        for seed, (name, target) in enumerate(names.items())
        if target in values and values[target].ndim > 1
        for suffix, tensor in adapter(kind, values[target], seed, **options).items()}


@pytest.mark.parametrize(("unets", "kind"), [
    pytest.param(name, kind, marks=pytest.mark.heavy
                 if name == "sdxl" and kind in ("loha", "lokr", "dora") else ())
    for name in ("sd1.5", "sdxl") for kind in ("lora", "locon", "loha", "lokr", "dora")
], indirect=["unets"])
def test_loras_of_a_unet_with_packed_convolutions(unets, kind):
    packed, dense, values, arguments = unets
    lora = lcm_lora(packed, values, kind, size=0.15)
    assert any(".lora_mid" in name for name in lora) == (kind == "locon")
    assert all(any(part in name for name in lora)
               for part in ("resnets_0_conv1.", "attn2_to_k."))
    without, layers = run(dense, arguments), packed_layers(packed)
    assert any(layer.weight.ndim == 4 for layer in layers)
    stack = (lora, 0.8), (lcm_lora(packed, values, size=0.1), 0.5)
    outputs = [run(patched(patcher, *stack), arguments) for patcher in (packed, dense)]
    assert error_by_effect(*outputs, without) < LIMIT
    assert relative(run(packed, arguments), without) < 1e-6
    assert packed_layers(packed) == layers


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
    sizes = {"model_config": dict(SMALL), "dtype": torch.float32}  # the host may add to it

    def load(state_dict, options):
        return comfy.sd.load_text_encoder_state_dicts(
            [state_dict], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
            model_options=options | sizes)

    return loaded(load, encoder_weights(encoder))


def te_lora(values, seed=0, prefix="lora_te"):
    layers = {name: value for name, value in values.items() if ".layers." in name}
    return lora_for(layers, seed=seed, size=0.2,
                    layer_name=lambda name: f"{prefix}_" + name.replace(".", "_"))


def flat(cond, pooled):
    return torch.cat([cond.flatten(), pooled.flatten()])


def encode(clip, text="a red fox"):
    return flat(*clip.encode_from_tokens(clip.tokenize(text), return_pooled=True))


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_text_encoder_loras(clips, prefix):
    packed, dense, values = clips
    without, layers = encode(dense), packed_layers(packed.patcher)
    assert relative(encode(packed), without) < 1e-6
    first, second = te_lora(values, 1, prefix), te_lora(values, 2, prefix)
    for stack in ([(first, 1.0)], [(first, 0.4)], [(first, 0.4), (second, -0.8)]):
        patched = [patched_clip(clip, *stack) for clip in (packed, dense)]
        assert [isinstance(clip.patcher, PackedPatcher) for clip in patched] == [True, False]
        assert error_by_effect(*map(encode, patched), without) < LIMIT
        assert packed_layers(packed.patcher) == layers
    assert relative(encode(packed), without) < 1e-6


def test_a_lora_on_a_packed_embedding(clips):
    *both, values = clips
    name = "text_model.embeddings.token_embedding"
    factors = adapter("lora", values[f"{name}.weight"], 1, size=1.0)
    lora = {f"text_encoders.clip_l.transformer.{name}.{suffix}": tensor
            for suffix, tensor in factors.items()}
    outputs = [encode(patched_clip(clip, (lora, 1.0))) for clip in both]
    assert error_by_effect(*outputs, encode(both[1])) < LIMIT


def test_an_embedding_in_the_prompt_with_a_lora_on_the_packed_text_encoder(clips, tmp_path):
    *both, values = clips
    comfy.utils.save_torch_file(
        {"clip_l": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5)) * 0.02},
        str(tmp_path / "my_style.safetensors"))
    outputs = []
    for clip in both:
        clip = patched_clip(clip, (te_lora(values, 1), 0.5))
        clip.tokenizer.clip_l.embedding_directory = str(tmp_path)
        outputs.append((encode(clip, "a fox in embedding:my_style"), encode(clip, "a fox in")))
    assert relative(outputs[0][0], outputs[1][0]) < 1e-5
    assert relative(outputs[1][0], outputs[1][1]) > 1e-3  # the embedding is found, and matters


def hooked(clip, values, keyframes=()):
    """(a clone with a LoRA and another one as a hook, with a schedule or for the whole prompt; a
    clone with the LoRA)"""
    from comfy_extras.nodes_hooks import SetClipHooks

    clip = patched_clip(clip, (te_lora(values, 1), 0.5))
    hooks = comfy.hooks.create_hook_lora(lora=te_lora(values, 2), strength_model=0.0,
                                         strength_clip=0.8)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in keyframes:
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
    return SetClipHooks().apply_hooks(clip, apply_to_conds=False, schedule_clip=bool(keyframes),
                                      hooks=hooks)[0], clip


def test_hooks_on_a_text_encoder_with_a_schedule(clips):
    packed, dense, values = clips
    without, results = encode(dense), []
    for clip in (packed, dense):
        with_hook, clip = hooked(clip, values, [(1.0, 0.0), (0.2, 0.5)])
        scheduled = with_hook.encode_from_tokens_scheduled(with_hook.tokenize("a red fox"))
        assert len(scheduled) == 2
        results.append([*(flat(cond, rest["pooled_output"]) for cond, rest in scheduled),
                        encode(clip)])
    for actual, expected in zip(*results):
        assert error_by_effect(actual, expected, without) < LIMIT
    assert relative(results[0][0], results[0][1]) > 0.02
    assert relative(encode(packed), without) < 1e-6


@pytest.mark.parametrize("loaded", [False, True])
def test_hooks_on_a_text_encoder_for_the_whole_prompt(clips, loaded):
    packed, dense, values = clips
    without, results = encode(dense), []
    for clip in (packed, dense):
        comfy.model_management.unload_all_models()
        if loaded:
            encode(clip)
        with_hook, clip = hooked(clip, values)
        results.append([encode(with_hook), encode(clip), encode(with_hook)])
    for actual, expected in zip(*results):
        assert error_by_effect(actual, expected, without) < LIMIT
    assert relative(results[0][0], results[0][1]) > 0.1


def test_a_saved_text_encoder_is_dense_with_its_patches_in_it(clips):
    *both, values = clips
    saved = []
    for clip in both:
        clip = patched_clip(clip, (te_lora(values, 1), 0.7))
        clip.load_model()
        saved.append(clip.state_dict_for_saving())
    assert saved[0].keys() == saved[1].keys()
    for name in saved[1]:
        if ".layers.0." in name or "token_embedding" in name:
            assert torch.allclose(saved[0][name].to("cpu"), saved[1][name].to("cpu"),
                                  atol=1e-5), name
