"""Files that a loader does not take: the sentence says what they are and where they belong."""
import json
import random

import comfy.ldm.ace.vae.music_dcae_pipeline
import comfy.ldm.audio.autoencoder
import comfy.ldm.genmo.vae.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.taesd.taesd
import pytest
import torch
from checkpoint_parts import autoencoder, clip_l
from comfy.ldm.models.autoencoder import AutoencoderKL
from controlnets import flux_bfl
from families import FAMILIES, comfyui_gguf_style, random_weights, shrunken_detection
from pack_api import (
    WeightFileError,
    load_checkpoint,
    load_diffusion_model,
    load_notes,
    load_text_encoder,
)
from patched_models import tiny_flux
from safetensors.torch import save_file

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.comfyui import unknown_model as unknown_model_module
from featherweight.loaders.inspect import inspect
from featherweight.loaders.models.controlnet import load_controlnet
from featherweight.loaders.models.vae import load_vae

pytestmark = pytest.mark.usefixtures("small_models")

KL = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
WAN = {"dim": 32, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "attn_scales": [],
       "temperal_downsample": [False, True, True]}
VAES = {
    "images": lambda: AutoencoderKL(ddconfig=KL, embed_dim=4),
    "images, small": comfy.taesd.taesd.TAESD,
    "video of Wan": lambda: comfy.ldm.wan.vae.WanVAE(**WAN),
    "video of Wan 2.2": lambda: comfy.ldm.wan.vae2_2.WanVAE(z_dim=48),
    "video of Mochi": comfy.ldm.genmo.vae.model.VideoVAE,
    "sound of ACE-Step": lambda: comfy.ldm.ace.vae.music_dcae_pipeline.MusicDCAE(
        source_sample_rate=44100),
    "sound of Stable Audio": comfy.ldm.audio.autoencoder.AudioOobleckVAE,
}


@pytest.mark.parametrize("name", VAES)
def test_a_vae_is_told_where_another_kind_is_expected(name, tmp_path):
    names = list(VAES[name]().state_dict())
    path = tmp_path / f"a.{random.choice(['gguf', 'safetensors'])}"
    load = random.choice([load_diffusion_model, load_checkpoint])
    weights = {key: torch.ones((2,) if key.endswith("bias") else (2, 2)) for key in names}
    if path.exists():
        pass  # the error before this one has it mapped, so that Windows would not write over it
    elif path.suffix == ".gguf":
        write_gguf(path, weights, lambda name, values: "F32")
    else:
        save_file(weights, path)
    with pytest.raises(WeightFileError, match=(
            f"^{path.name} is a VAE .it has '.*'., expected a diffusion model. Load it with Load"
            " VAE.$")):
        load(str(path))
    assert inspect(path)[0].model_type == "VAE"
    with pytest.raises(WeightFileError, match=(
            f"^{path.name} is a VAE .it has '.*'., expected a text encoder. Pick a text encoder"
            " here.$")):
        load_text_encoder([str(path)])


ORBIT_QUANT = {"packed_weight_indices": torch.ones(64, dtype=torch.uint8),
               "row_norms": torch.ones(8, dtype=torch.bfloat16)}
DFLOAT11 = {"encoded_exponent": torch.ones(64, dtype=torch.uint8),
            "sign_mantissa": torch.ones(64, dtype=torch.uint8),
            "luts": torch.ones(2, 256, dtype=torch.uint8),
            "gaps": torch.ones(4, dtype=torch.uint8),
            "output_positions": torch.ones(4, dtype=torch.uint32)}
LOADERS = {
    "diffusion model": (load_diffusion_model, tiny_flux),
    "checkpoint": (load_checkpoint, lambda: {
        f"model.diffusion_model.{name}": value for name, value in tiny_flux().items()}),
    "text encoder": (lambda path: load_text_encoder([path]), lambda: {
        name.removeprefix("transformer."): value for name, value in clip_l().items()}),
    "VAE": (load_vae, autoencoder),
    "ControlNet": (load_controlnet, flux_bfl),
}


@pytest.mark.parametrize(("name", "in_folder"), [
    *((name, False) for name in LOADERS), ("diffusion model", True), ("text encoder", True)])
def test_files_of_quantizers_that_are_not_read_are_named(name, in_folder, tmp_path):
    load, weights = LOADERS[name]
    who, parts = random.choice([("OrbitQuant", ORBIT_QUANT), ("DFloat11", DFLOAT11)])
    weights = dict(weights())
    for key in [key for key in weights if key.endswith(".weight") and weights[key].ndim > 1]:
        del weights[key]
        weights |= {key.replace("weight", part): value.clone() for part, value in parts.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)
    if in_folder:
        (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        path = folder
    with pytest.raises(WeightFileError, match=(
            f"is part of layers quantized by {who}, which is not supported")) as error:
        load(str(path))
    assert "again" not in str(error.value)
    found, = inspect(path)
    assert who in found.title and "again" not in found.title


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_connectors_of_ltx_2_are_a_module_that_the_loader_asks_for(suffix, tmp_path, monkeypatch):
    family = FAMILIES["ltx-2"]
    shrunken_detection(family, monkeypatch)
    weights = dict(random_weights(family))
    connectors = {key: weights.pop(key) for key in list(weights) if "embeddings_connector" in key}
    model, module = tmp_path / f"model{suffix}", tmp_path / "connectors.safetensors"
    if suffix == ".gguf":
        write_gguf(model, weights, **comfyui_gguf_style(), metadata=family.metadata)
    else:
        save_file(weights, model, dict(family.metadata))
    save_file({f"model.diffusion_model.{key}": value for key, value in connectors.items()}
              | {"model.diffusion_model.video_embeddings_connector.stray": torch.ones(2),
                 "text_embedding_projection.aggregate_embed.weight": torch.ones(2, 2)}, module)
    note, = load_notes(load_diffusion_model(str(model)))
    assert "connectors are missing" in note and "at module" in note and "again" not in note
    assert load_notes(load_diffusion_model(str(model), extra=str(module))) == (
        "The model does not use 'video_embeddings_connector.stray' of connectors.safetensors.",)
    found, = inspect(module)
    assert found.model_type == "module with LTX-2's connectors"
    with pytest.raises(WeightFileError, match="connectors.safetensors is a module with LTX-2's"):
        load_diffusion_model(str(module))
    lost = random.choice(list(connectors))
    del connectors[lost]
    save_file(connectors, tmp_path / "part.safetensors")
    with pytest.raises(WeightFileError, match=f"lacks weights of the model: '{lost}'"):
        load_diffusion_model(str(model), extra=str(tmp_path / "part.safetensors"))


def test_stable_audio_without_its_conditioners_is_a_plain_sentence(tmp_path):
    names = {
        "transformer.rotary_pos_emb.inv_freq": (16,), "to_timestep_embed.0.weight": (64, 16),
        "timestep_features.weight": (8, 1), "preprocess_conv.weight": (8, 8, 1),
        "postprocess_conv.weight": (8, 8, 1), "to_global_embed.0.weight": (64, 64),
        "to_cond_embed.0.weight": (64, 64)}
    weights = {f"model.model.{name}": torch.ones(shape) for name, shape in names.items()}
    weights["model.model.transformer.project_in.weight"] = torch.ones(64, 8)
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(WeightFileError, match=(
            "^dit.safetensors: it lacks weights of ComfyUI's NumberConditioner: '.*They are in the"
            r" checkpoint of Stable Audio: pick that in Load Checkpoint \(GGUF,"
            r" Featherweight\).$")):
        load_diffusion_model(str(tmp_path / "dit.safetensors"))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_a_folder_of_a_pipeline_is_named_with_it(part, tmp_path):
    load, weights = LOADERS[{"transformer": "diffusion model", "vae": "VAE"}.get(
        part, "text encoder")]
    folder = tmp_path / "FLUX.1-dev" / part
    folder.mkdir(parents=True)
    weights = dict(weights())
    del weights[random.choice([key for key in weights if key.endswith(".bias") and (
        "mlp" in key or part == "vae")])]
    save_file({key: value.contiguous().clone() for key, value in weights.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    with pytest.raises(WeightFileError, match=f"^FLUX.1-dev/{part} lacks weights of the model"):
        load(str(folder))


# names of published files -> (the model, which ComfyUI reads it)
NEWER = {
    "flux3-image-klein-base-int8-convrot.safetensors": ("FLUX.3", "in a version after 0.33"),
    "FLUX-3-Image-Klein-AD-Q4_K.gguf": ("FLUX.3", "in a version after 0.33"),
    "qwen_image_2.1_turbo_bf16.safetensors": ("Qwen-Image-2.1", "in a version after 0.33"),
    "qwen-image-2.1-Q4_K_M.gguf": ("Qwen-Image-2.1", "in a version after 0.33"),
    "ltx-2.5-22b-distilled-UD-Q4_K_XL.gguf": ("LTX-2.5", "in a version after 0.33"),
    "LTX-2.5-Distilled-Q8_0.gguf": ("LTX-2.5", "in a version after 0.33"),
    "minimax_h3_image_pruned_int8_convrot.safetensors": ("MiniMax-H3-Image", "from 0.45.2 on"),
    "P-H3-Image-AD-Q5_K.gguf": ("P-H3-Image", "from 0.44 on"),
    "MOSS-Image-Q4_K_M.gguf": ("MOSS-Image", "from 0.42 on"),
}
OLDER = ("qwen-image-2512-Q4_K_M.gguf", "ltx-2.3-22b-dev-Q3_K.gguf", "flux1-dev-Q3_K_S.gguf",
         "minimax_h3_fl2va_pruned-Q4_K.gguf", "Wan2.2-I2V-A14B-HighNoise-Q2_K.gguf",
         "flux-3d-render.safetensors", "flux1-dev-flux-3steps.gguf", "ltx-25fps.safetensors")


def unknown_model(path) -> str:
    """The sentence on a file of tensors that no model has."""
    if not path.exists():  # an error before has it mapped, and Windows would not write over it
        weights = {f"blocks.{index}.odd.weight": torch.ones(8, 8) for index in range(20)}
        if path.suffix == ".gguf":
            write_gguf(path, weights, lambda name, values: "F32")
        else:
            save_file(weights, path)
    with pytest.raises(WeightFileError) as error:
        random.choice([load_diffusion_model, load_checkpoint])(str(path))
    return str(error.value)


@pytest.mark.parametrize("name", NEWER)
def test_a_model_of_a_newer_comfyui_is_named_and_the_version_where_it_is_known(
        name, tmp_path, monkeypatch):
    title, since = NEWER[name]
    monkeypatch.setattr(unknown_model_module, "HOST_VERSION", "0.33.1")
    assert unknown_model(tmp_path / name) == (
        f"{name} is {title} by its name, which ComfyUI reads {since}; this is ComfyUI 0.33.1."
        " Update ComfyUI.")
    monkeypatch.setattr(unknown_model_module, "HOST_VERSION", "0.50.0")
    assert "holds no diffusion model that this ComfyUI knows" in unknown_model(
        tmp_path / name).replace("checkpoint", "diffusion model")


@pytest.mark.parametrize("name", OLDER)
def test_an_unknown_file_named_like_another_model_is_not_taken_for_a_newer_one(name, tmp_path):
    assert "by its name" not in unknown_model(tmp_path / name)
