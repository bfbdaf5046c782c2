"""Names of LoRA layers that the host does not know: each spelling of a weight's name finds it."""
import comfy.utils
import pytest
import torch
from diffusers_names import OF_FLUX, flux
from families import FAMILIES
from lora_models import empty_clip, empty_model, empty_model_of, pairs, weight_shapes

from featherweight.loaders.lora.compatibility import check_lora
from featherweight.loaders.lora.report import report_text

PREFIX = "diffusion_model."
SMALL = {"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
         "context_in_dim": 64}
MODELS = {
    "Flux.1": lambda: empty_model("Flux.1", **SMALL, vec_in_dim=None, guidance_embed=False),
    "Flux.2": lambda: empty_model("Flux.2 dev", **SMALL, guidance_embed=False),
    "Z-Image": lambda: empty_model_of("ZImage", FAMILIES["z-image"].config)
}


def flux2_blocks(config):
    """The names of diffusers' Flux.2 that the host's table has."""
    return {
        name: target for name, target in comfy.utils.flux_to_diffusers(config).items()
        if "blocks" in name and not OF_FLUX.search(name)
    }


DIFFUSERS = {"Flux.1": flux, "Flux.2": flux2_blocks, "Z-Image": comfy.utils.z_image_to_diffusers}
SPELLINGS = {
    "bare": "{}".format, "transformer": "transformer.{}".format, "model": "model.{}".format,
    "lycoris": lambda name: "lycoris_" + name.replace(".", "_"),
    "oft_unet": lambda name: "oft_unet_" + name.replace(".", "_"),
    "lora_unet": lambda name: "lora_unet_" + name.replace(".", "_"),
    "saved by PEFT": "base_model.model.{}".format,
    "PEFT in a checkpoint": "model.diffusion_model.base_model.model.{}".format
}


@pytest.fixture(scope="module")
def models():
    built = {}
    return lambda name: built.setdefault(name, MODELS[name]()) if name in MODELS else None


def own_targets(model):
    return {name.removeprefix(PREFIX): (f"{name}.weight", shape)
            for name, shape in weight_shapes(model.model).items() if ".norm" not in name}


def diffusers_targets(model, table):
    weights = dict(model.model.named_parameters())
    targets = {}
    for name, target in table(model.model.model_config.unet_config).items():
        key, *rest = (target,) if isinstance(target, str) else target
        weight = weights.get(PREFIX + key)
        if name.endswith(".weight") and weight is not None and weight.ndim > 1:
            part = rest[0] if rest else None
            rows = weight.shape[0] if part is None else part[2]
            targets[name.removesuffix(".weight")] = (
                (PREFIX + key, *rest) if rest else PREFIX + key, (rows, weight.shape[1]))
    return targets


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("whose", ["own", "diffusers"])
@pytest.mark.parametrize("name", MODELS)
def test_each_spelling_of_a_weights_name_is_that_weight(models, name, whose, spelling):
    model = models(name)
    targets = own_targets(model) if whose == "own" else diffusers_targets(model, DIFFUSERS[name])
    lora = pairs({SPELLINGS[spelling](key): shape for key, (_, shape) in targets.items()})
    report = check_lora(model, None, lora, measure=False)
    assert report.mismatches == {} and report.fits == "yes"
    assert report.patches.keys() == {target for target, _ in targets.values()}
    for key, (target, _) in targets.items():
        factors = report.patches[target].weights
        assert factors[0] is lora[f"{SPELLINGS[spelling](key)}.lora_up.weight"]


# --- text encoders ---

# (encoders, names of a layer as transformers has them and its shape)
ENCODERS = {
    "CLIP-L": ("SD1.5", "clip_l", "text_model.encoder.layers.1.self_attn.q_proj", (768, 768)),
    "CLIP-L of SDXL": ("SDXL", "clip_l", "text_model.encoder.layers.1.mlp.fc1", (3072, 768)),
    "CLIP-G of SDXL": ("SDXL", "clip_g", "text_model.encoder.layers.1.mlp.fc1", (5120, 1280)),
    "T5": ("T5", "t5xxl", "encoder.block.1.layer.0.SelfAttention.q", (64, 64)),
    "Qwen3": ("Qwen3", "qwen3_4b", "model.layers.1.self_attn.q_proj", (64, 64)),
}
TEXT_SPELLINGS = {
    "bare": "{}".format, "PEFT": "base_model.model.{}".format,
    "diffusers": "text_encoder.{}".format, "the second of diffusers": "text_encoder_2.{}".format,
    "diffusers and PEFT": "text_encoder.base_model.model.{}".format,
    "kohya": lambda name: "lora_te1_" + name.replace(".", "_"),
    "ComfyUI's": "text_encoders.transformer.{}".format,
    "in a checkpoint": "cond_stage_model.transformer.{}".format,
}


def text_encoder(encoders, part, layer, shape):
    """A CLIP with such a weight; of the host where it has one that is small enough."""
    if encoders.startswith("SD"):
        return empty_clip(encoders)
    clip, module = empty_clip("SD1.5"), torch.nn.Module()
    module.add_module(part, torch.nn.Module())
    inner = getattr(module, part)
    for name in ("transformer", *layer.split(".")):
        inner.add_module(name, torch.nn.Module())
        inner = getattr(inner, name)
    inner.weight = torch.nn.Parameter(torch.zeros(shape))
    clip.cond_stage_model = module
    return clip


@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_each_spelling_of_a_text_encoders_weight_is_that_weight(models, encoder, spelling):
    encoders, part, layer, shape = ENCODERS[encoder]
    name = TEXT_SPELLINGS[spelling](layer)
    if encoders == "SDXL" and spelling in {
            "clip_l": ["the second of diffusers"], "clip_g": ["diffusers", "kohya"]}[part]:
        pytest.skip("it is a name of the other encoder")
    clip = text_encoder(*ENCODERS[encoder])
    report = check_lora(models("Flux.1"), clip, pairs({name: shape}), measure=False)
    assert report.fits == "yes" and report.unread == []
    assert list(report.patches) == [f"{part}.transformer.{layer}.weight"]
    alone = check_lora(models("Flux.1"), None, pairs({name: shape}), measure=False)
    assert alone.verdict == (
        "This LoRA changes only a text encoder (1 layers), and none is connected.")


def test_a_lora_of_another_text_encoder_is_told_with_the_one_that_is_connected(models):
    clip = empty_clip("SDXL")
    report = check_lora(models("Flux.1"), clip, pairs(
        {"model.layers.40.self_attn.q_proj": (4096, 4096)}), measure=False)
    assert report.verdict == (
        "None of the 1 layers of this LoRA matches the text encoder (clip_l, clip_g):"
        " model.layers.40.self_attn.q_proj: missing in the text encoder.")


def test_an_unknown_prefix_is_named(models):
    layer = "double_blocks.0.img_attn.proj"
    report = check_lora(models("Flux.1"), None, pairs({f"mine.{layer}": (128, 128)}))
    assert report.mismatches == {
        f"mine.{layer}":
        f"its name is that of diffusion_model.{layer}.weight after the unknown prefix 'mine.'"
    }
    assert "the unknown prefix 'mine.'" in report_text(report)


# the one that this pack resolves, and two names that ComfyUI knows
@pytest.mark.parametrize("second", ["transformer.{}", "lora_unet_double_blocks_0_img_attn_proj",
                                    "transformer.transformer_blocks.0.attn.to_out.0"])
def test_a_second_layer_for_the_same_weight_is_not_applied(second, models):
    layer = "double_blocks.0.img_attn.proj"
    second = second.format(layer)
    lora = pairs({PREFIX + layer: (128, 128), second: (128, 128)})
    report = check_lora(models("Flux.1"), None, lora)
    assert report.mismatches == {second: "for a weight that another layer of the file changes"}
    (patch,) = report.patches.values()
    assert patch.weights[0] is lora[f"{PREFIX}{layer}.lora_up.weight"]
