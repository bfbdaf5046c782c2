"""Checkpoints with packed weights: model, text encoder and VAE are the host's, run as in the host,
and stay packed."""
import functools
import json

import comfy.model_management
import comfy.sd
import pytest
import torch
from checkpoint_parts import (
    ENCODER,
    MODEL,
    SD15,
    VAE,
    autoencoder,
    clip_l,
    flux,
    quantise_once,
    stable_diffusion,
)
from families import FAMILIES, random_weights, relative_error
from families import run as run_family
from host_formats import ASYMMETRIC, in_host_format
from pack_api import (
    WeightFileError,
    load_checkpoint,
    load_notes,
)
from patched_models import LIMIT, error_by_effect, lora_for, packed_layers, relative, run
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.families import MODELS
from featherweight.ops.layers import cpu_linear as cpu_linear
from featherweight.ops.patcher import PackedPatcher

pytest.importorskip("bitsandbytes", reason="it writes the files")
from devtools.files import bnb_files

write_bnb = functools.partial(bnb_files.write_bnb, quantise=quantise_once)
NO_VAE = "your checkpoint does not contain a valid VAE"


pytestmark = pytest.mark.usefixtures("small_models")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "checkpoint.safetensors")


def of_the_host(seen):
    """(model, CLIP, VAE) that the host makes of dense values, the text encoder in float32."""
    return comfy.sd.load_state_dict_guess_config(
        {name: value.clone() for name, value in seen.items()},
        te_model_options={"dtype": torch.float32})[:3]


def encode(clip) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize("a feather on a scale"))


def decode(vae, channels: int) -> torch.Tensor:
    return vae.decode(torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(3)))


def packed_in(clip) -> int:
    return len(packed_layers(clip.patcher))


@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_the_vae_decodes_with_its_channels_last_on_a_cpu_and_keeps_its_bits_with_float32(
        compute, path, monkeypatch):
    weights = {MODEL + name: value for name, value in flux().items()}
    weights |= {f"vae.{name}": value for name, value in autoencoder().items()}
    *_, expected = of_the_host(write_bnb(path, weights))
    monkeypatch.setattr(cpu_linear, "takes", lambda input: not torch.compiler.is_compiling())
    *_, vae = load_checkpoint(path, compute=compute)
    again = vae.patcher.cached_patcher_init[0]().model
    latent = torch.randn(1, 16, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = expected.first_stage_model.decode(latent)
        for model in (vae.first_stage_model, again):
            picture = model.decode(latent)
            assert relative(picture, exact) < 1e-5
            assert torch.equal(picture, exact) == (compute == "float32")
            last = picture.is_contiguous(memory_format=torch.channels_last)
            assert last == (compute == "exact")


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)])
def test_a_flux_with_its_vae(quant_type, nested, path):
    weights = {MODEL + name: value for name, value in flux().items()}
    weights |= {
        f"vae.{name}": value.bfloat16() if value.ndim else value
        for name, value in autoencoder().items()
    }
    seen = write_bnb(path, weights, quant_type, nested=nested)
    expected, _, expected_vae = of_the_host(seen)
    model, clip, vae = load_checkpoint(path)
    assert relative(run(model), run(expected)) < 1e-5 and len(packed_layers(model)) == 19
    assert clip is None  # the host's nodes say what that means
    assert torch.equal(decode(vae, 16), decode(expected_vae, 16))


@pytest.mark.parametrize("packed_encoder", [False, True])
def test_a_stable_diffusion_with_its_text_encoder(packed_encoder, path):
    skip = (VAE,) if packed_encoder else (VAE, ENCODER)
    seen = write_bnb(path, stable_diffusion(), keep=lambda name, value: (
        value.ndim != 2 or not name.endswith(".weight") or name.startswith(skip)))
    expected, expected_clip, expected_vae = of_the_host(seen)
    model, clip, vae = load_checkpoint(path)
    assert relative_error(run_family(model, SD15), run_family(expected, SD15)) < 1e-5
    assert packed_layers(model)
    assert packed_in(clip) == (74 if packed_encoder else 0)
    assert relative(encode(clip), encode(expected_clip)) < 1e-5
    assert torch.equal(decode(vae, 4), decode(expected_vae, 4))


def test_parts_in_fp8_and_bf16_load_as_they_are(path):
    family = FAMILIES["sd3.5"]
    weights = {MODEL + name: value for name, value in random_weights(family).items()}
    weights |= {
        f"text_encoders.clip_l.{name}": value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
        for name, value in clip_l().items()
    }
    weights |= {
        VAE + name: value.bfloat16() if value.ndim else value
        for name, value in autoencoder().items()
    }
    seen = write_bnb(path, weights,
                     keep=lambda name, value: value.ndim != 2 or not name.startswith(MODEL))
    others = {name: value for name, value in weights.items() if not name.startswith(MODEL)}
    expected, expected_clip, expected_vae = of_the_host(seen | others)
    model, clip, vae = load_checkpoint(path)
    assert relative_error(run_family(model, family), run_family(expected, family)) < 1e-5
    assert packed_layers(model) and not packed_in(clip)
    # the host rounds fp8 to fp16 by itself, not to float32
    assert relative(encode(clip), encode(expected_clip)) < 1e-3
    assert torch.equal(decode(vae, 16), decode(expected_vae, 16))


def test_a_gguf_of_stable_diffusion_cpp(tmp_path):
    path = str(tmp_path / "checkpoint.gguf")
    types = {1: "F16", 2: "Q8_0"}
    seen = write_gguf(path, {name: value.numpy() for name, value in stable_diffusion().items()},
                      lambda name, values: types.get(values.ndim, "F16"), architecture=None)
    expected, expected_clip, expected_vae = of_the_host(
        {name: torch.tensor(value) for name, value in seen.items()})
    model, clip, vae = load_checkpoint(path)
    assert relative_error(run_family(model, SD15), run_family(expected, SD15)) < 1e-5
    assert packed_layers(model) and packed_in(clip) > 70
    assert relative(encode(clip), encode(expected_clip)) < 1e-5
    assert relative(decode(vae, 4), decode(expected_vae, 4)) < 1e-5


def test_loras_reach_model_and_text_encoder(path):
    seen = write_bnb(
        path, stable_diffusion(), keep=lambda name, value: (value.ndim != 2 or not name.endswith(
            ".weight") or "embedding" in name or name.startswith(VAE)))
    model, clip, _ = load_checkpoint(path, output_vae=False)
    expected, expected_clip, _ = of_the_host(seen)
    layers = {name.removeprefix(ENCODER + "transformer."): value for name, value in seen.items()
              if name.startswith(ENCODER) and ".layers.0." in name and name.endswith("weight")}
    lora = lora_for(layers, layer_name=lambda name: "lora_te_" + name.replace(".", "_"), size=0.1)
    lora |= lora_for(
        {
            name.removeprefix(MODEL): value for name, value in seen.items()
            if name.startswith(MODEL) and "transformer_blocks" in name and name.endswith("weight")
        }, layer_name=lambda name: "diffusion_model." + name)
    changed, changed_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    wanted, wanted_clip = comfy.sd.load_lora_for_models(expected, expected_clip, lora, 1.0, 1.0)
    without = run_family(expected, SD15)
    assert error_by_effect(run_family(changed, SD15), run_family(wanted, SD15), without) < LIMIT
    effect = (encode(wanted_clip) - encode(expected_clip)).norm()
    assert (encode(changed_clip) - encode(wanted_clip)).norm() / effect < LIMIT
    assert isinstance(changed_clip.patcher, PackedPatcher)


@pytest.mark.parametrize("parts", [{"transformer", "text_encoder", "vae"}, {"transformer"}])
def test_a_package_of_diffusers(parts, tmp_path):
    weights = {
        "transformer": flux(), "vae": autoencoder(), "text_encoder": {
            name.removeprefix("transformer."): value for name, value in clip_l().items()
        }
    }
    seen = {}
    for part in parts:
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        keep = (lambda name, value: True) if part == "vae" else None
        seen[part] = write_bnb(tmp_path / part / "model.safetensors", weights[part], keep=keep)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    if "vae" not in parts:
        (tmp_path / "transformer_2").mkdir()
        (tmp_path / "transformer_2" / "config.json").write_text("{}")
    model, clip, vae = load_checkpoint(str(tmp_path))
    assert any("has a second model, transformer_2," in note for note in load_notes(model)) == (
        "vae" not in parts)
    assert (
        relative(
            run(model), run(comfy.sd.load_diffusion_model_state_dict(dict(seen["transformer"])))
        )
        < 1e-5
    )
    assert len(packed_layers(model)) == 19
    if "vae" in parts:
        expected = comfy.sd.load_text_encoder_state_dicts(
            [dict(seen["text_encoder"])],
            clip_type=comfy.sd.CLIPType.FLUX,
            model_options={"dtype": torch.float32},
        )
        assert packed_in(clip) == 74 and relative(encode(clip), encode(expected)) < 1e-5
        assert torch.equal(decode(vae, 16), decode(comfy.sd.VAE(sd=dict(seen["vae"])), 16))
        again = clip.patcher.cached_patcher_init
        assert isinstance(again[0](*again[1], disable_dynamic=True), PackedPatcher)
    else:
        assert clip is None
        with pytest.raises(RuntimeError, match=NO_VAE):
            decode(vae, 16)


def package(tmp_path, pipeline, folder, *encoders):
    """The path of a package with text encoders of these tensors only."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    for number, name in enumerate(encoders, 1):
        place = tmp_path / ("text_encoder" if number == 1 else f"text_encoder_{number}")
        place.mkdir()
        (place / "config.json").write_text("{}")
        save_file({name: torch.zeros(10240, 1)}, place / "model.safetensors")
    return str(tmp_path)


CLIP_L, CLIP_G = (f"text_model.encoder.layers.{layer}.mlp.fc1.weight" for layer in (0, 30))
T5_XXL = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


@pytest.mark.parametrize(
    ("pipeline", "wanted"),
    [
        ("HiDreamImagePipeline", "hidream wants"),
        ("StableDiffusion3Pipeline", "sd3 wants"),
        ("FluxPipeline", "flux wants"),
        ("HunyuanVideo15Pipeline", "hunyuan_video_15 wants"),
        ("HunyuanVideoPipeline", "hunyuan_video wants"),
        ("HunyuanImagePipeline", "hunyuan_image wants"),
        ("Kandinsky5T2VPipeline", "kandinsky5 wants"),
        ("Kandinsky5T2IPipeline", "kandinsky5_image wants"),
    ],
)
def test_all_text_encoders_of_a_package_are_taken_for_those_of_its_pipeline(
        pipeline, wanted, tmp_path):
    fits = {
        "HiDreamImagePipeline": [CLIP_L, CLIP_G, T5_XXL],
        "StableDiffusion3Pipeline": [CLIP_L, CLIP_G]
    }
    unfit = "encoder.block.23.layer.1.DenseReluDense.wi.weight"
    with pytest.raises(WeightFileError, match=wanted):
        load_checkpoint(
            package(tmp_path, pipeline, "transformer", *fits.get(pipeline, [T5_XXL]), unfit),
            output_model=False, output_vae=False)


def test_every_type_of_a_pipeline_is_one_of_the_hosts():
    newer = {
        "hunyuan_video_15", "kandinsky5", "kandinsky5_image", "longcat_image", "ideogram4", "krea2",
        "joyimage", "ovis"
    }
    types = {model.clip_type for model in MODELS if model.pipelines}
    assert {kind.upper() for kind in types - newer} <= set(comfy.sd.CLIPType.__members__)


def test_several_text_encoders_of_an_unknown_pipeline_are_not_guessed_at(tmp_path):
    with pytest.raises(
            WeightFileError,
            match="was saved from the pipeline 'NewestPipeline', and its 2 text encoders are not"):
        load_checkpoint(package(tmp_path, "NewestPipeline", "transformer", CLIP_L, T5_XXL),
                        output_model=False, output_vae=False)


def test_a_folder_that_is_no_package_is_refused(tmp_path):
    with pytest.raises(WeightFileError, match="is not a diffusers folder"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("prefix", ["", MODEL])
def test_a_file_with_only_a_model(prefix, path):
    seen = write_bnb(path, flux(), prefix=prefix)
    model, clip, vae = load_checkpoint(path)
    expected = comfy.sd.load_diffusion_model_state_dict(dict(seen))
    assert isinstance(model, PackedPatcher) and relative(run(model), run(expected)) < 1e-5
    assert clip is None
    with pytest.raises(RuntimeError, match=NO_VAE):
        decode(vae, 16)
    assert load_checkpoint(path, output_vae=False)[2] is None


def test_a_checkpoint_without_packed_weights_is_the_hosts(path):
    weights = {
        MODEL + name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
        for name, value in flux().items()
    }
    save_file(weights, path)
    model, clip, vae = load_checkpoint(path)
    assert not isinstance(model, PackedPatcher) and clip is None
    assert model.cached_patcher_init[0] is comfy.sd.load_checkpoint_guess_config


def test_the_host_can_have_each_part_once_more(path):
    write_bnb(path, stable_diffusion(), keep=lambda name, value: (
        value.ndim != 2 or not name.endswith(".weight") or name.startswith(VAE)))
    model, clip, vae = load_checkpoint(path)
    for patcher in (model, clip.patcher, vae.patcher):
        rebuild, arguments = patcher.cached_patcher_init
        again = rebuild(*arguments, disable_dynamic=True)
        assert type(again.model) is type(patcher.model)
        assert again.model.state_dict().keys() == patcher.model.state_dict().keys()
        assert isinstance(again, PackedPatcher) == (patcher is not vae.patcher)


def test_a_text_encoder_may_have_a_layer_that_this_comfyui_does_not_read(path):
    weights = dict(stable_diffusion())
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    parts, values = in_host_format(name, weights[name].float(), ASYMMETRIC)
    save_file(weights | {key: part.contiguous() for key, part in parts.items()}, path)
    _, clip, _ = load_checkpoint(path, output_model=False, output_vae=False)
    weight = clip.cond_stage_model.clip_l.transformer.get_parameter(
        name.removeprefix(f"{ENCODER}transformer."))
    assert relative(weight.dequantize(), values) < 1e-3 and encode(clip).isfinite().all()  # float16


@pytest.mark.parametrize(("prefix", "kind"), [(MODEL, "no checkpoint"), ("", "no diffusion model")])
def test_what_is_no_checkpoint_is_refused(path, prefix, kind):
    write_bnb(path, {f"{prefix}layers.{number}.weight": torch.randn(64, 64) for number in range(9)})
    with pytest.raises(
            WeightFileError,
            match=f"checkpoint.safetensors holds {kind} that this ComfyUI knows") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
