"""Small files in place of those that the example workflows name: real models, small or with few
layers, and not trained."""
import json

import comfy.ldm.lightricks.vae.audio_vae
import comfy.ldm.lightricks.vae.causal_video_autoencoder
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.taesd.taehv
import comfy.utils
import nunchaku_writer
import sdnq_writer
import torch
from families import FAMILIES, random_weights
from published_models import family_of
from safetensors.torch import save_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_gguf

FLUX_SIZES = {"hidden": 256, "double_blocks": 1, "single_blocks": 1, "context": 1024}
# In the trainers' naming for one part of the model, in PEFT's for the other.
LORAS = {
    "first": {
        "seed": 11, "part": "double_blocks", "layer": "lora_unet_{flat}",
        "down": ".lora_down.weight", "up": ".lora_up.weight"
    }, "second": {
        "seed": 12, "part": "single_blocks", "layer": "diffusion_model.{name}",
        "down": ".lora_A.weight", "up": ".lora_B.weight"
    }
}
FIRST, SECOND = LORAS


def flux(**sizes) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(value)
        for name, value in tiny_models.flux(**FLUX_SIZES, **sizes).items()
    }


def autoencoder(channels: int = tiny_models.LATENT_CHANNELS) -> dict[str, torch.Tensor]:
    values = {name: torch.from_numpy(value) for name, value in tiny_models.autoencoder().items()}
    for name, axis in {
            "taesd_decoder.1.weight": 1, "taesd_encoder.14.weight": 0, "taesd_encoder.14.bias": 0
    }.items():
        values[name] = values[name].narrow(axis, 0, channels).contiguous()
    return values


def flux_in_diffusers_names(flux: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a Flux in the names of diffusers, which keeps q, k and v apart."""
    names = comfy.utils.flux_to_diffusers({
        "depth": FLUX_SIZES["double_blocks"], "hidden_size": FLUX_SIZES["hidden"],
        "depth_single_blocks": FLUX_SIZES["single_blocks"]
    })
    # the table's spelling
    source = {name.replace("_norm.scale", "_norm.weight"): value for name, value in flux.items()}
    weights, done = {}, set()
    for name, target in names.items():
        if "to_qkv_mlp_proj" in name:  # Flux 2's name of all rows
            continue
        layer, part, swap = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        if layer in source and (layer, part) not in done:  # the host knows two names of some layers
            done.add((layer, part))
            value = source[layer] if part is None else source[layer].narrow(*part)
            weights[name] = (swap(value) if swap else value).contiguous()
    return weights


def nf4(path, weights=None, keep=None):
    from devtools.files.bnb_files import write_bnb  # takes the bitsandbytes package
    write_bnb(path, weights or flux(), keep=keep)


def nf4_checkpoint(path):
    weights = {f"model.diffusion_model.{name}": value for name, value in flux().items()}
    vae = {f"vae.{name}": value for name, value in autoencoder().items()}
    nf4(path, weights | vae, keep=lambda name, value: value.ndim != 2 or name.startswith("vae."))


def nf4_folder(path):
    """As diffusers saves a model: its own names, and a config."""
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({
            "_class_name": "FluxTransformer2DModel", "quantization_config": {
                "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"
            }
        }))
    nf4(path / "diffusion_pytorch_model.safetensors", flux_in_diffusers_names(flux()))


def svdquant(path):
    """As Nunchaku's tools write a model."""
    nunchaku_writer.write(path, nunchaku_writer.flux(flux_in_diffusers_names(flux())))


def qwen_image_folder(path):
    """As diffusers saves a model of SDNQ."""
    sdnq_writer.write_folder(path, random_weights(FAMILIES["qwen-image"]), rank=16, group=64,
                             config={"_class_name": "QwenImageTransformer2DModel"},
                             is_chosen=lambda name, values: values.ndim == 2 and all(
                                 size % 64 == 0 for size in values.shape))


def flux_bf16(path):
    save_file({name: value.bfloat16() for name, value in flux().items()}, path)


def flux_gguf(path):
    write_gguf(path, flux(), lambda name, values: "Q4_K" if values.ndim == 2 else "F32")


def family_gguf(path, family: str, packed_type: str = "Q4_K"):
    """A model of `families`, or a variant of `published_models`."""
    write_gguf(path, random_weights(family_of(family)), lambda name, values: packed_type
               if values.ndim == 2 else "F32", metadata=family_of(family).metadata)


def family_bf16(path, family: str):
    """A model of `families`, in safetensors."""
    save_file({name: value.bfloat16() for name, value in random_weights(FAMILIES[family]).items()},
              path)


def vace_module(path):
    """The layers of VACE for Wan, matrices in fp8."""
    save_file({name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
               for name, value in random_weights(FAMILIES["wan2.1-vace"]).items()
               if name.startswith("vace_")}, path)


def stable_diffusion_gguf(path, family: str = "sd1.5", with_text_encoder: bool = True):
    """As stable-diffusion.cpp: matrices packed, everything else in F16, nothing said about the
    architecture."""
    weights = {
        f"model.diffusion_model.{name}": value
        for name, value in random_weights(FAMILIES[family]).items()
    }
    weights |= {
        f"first_stage_model.{name}": value for name, value in autoencoder(channels=4).items()
    }
    generator = torch.Generator().manual_seed(1)
    for name, shape in tiny_models.clip_l_shapes().items() if with_text_encoder else ():
        value = torch.randn(shape, generator=generator) * 0.03 + (
            "norm" in name and name.endswith("weight")
        )
        weights[f"cond_stage_model.transformer.{name}"] = value
    write_gguf(path, weights, lambda name, values: "Q8_0"
               if values.ndim == 2 else "F16", architecture=None)


def controlnet(path):
    """For Flux, of the kind that is a shortened Flux in diffusers' names."""
    weights = {
        name: value.clone()
        for name, value in flux_in_diffusers_names(flux(pooled_text=True)).items()
        if not name.startswith(("norm_out", "proj_out"))
    }
    hidden = FLUX_SIZES["hidden"]
    layers = {
        "controlnet_blocks.0": hidden, "controlnet_single_blocks.0": hidden,
        "controlnet_x_embedder": 64
    }
    generator = torch.Generator().manual_seed(2)
    for name, width in layers.items():
        weights |= {
            f"{name}.weight": torch.randn(hidden, width, generator=generator) * width ** -0.5,
            f"{name}.bias": torch.zeros(hidden)
        }
    save_file(weights, path)


def flux_lora(path, name: str):
    factors = tiny_models.flux_lora(**LORAS[name], **FLUX_SIZES)
    save_file({name: torch.from_numpy(value) for name, value in factors.items()}, path)


def lora(path, family: str, part: str, layer: str = "diffusion_model.{name}",
         ends=(".lora_A.weight", ".lora_B.weight")):
    """For the matrices of a family whose names contain `part`. layer: their names; `{flat}` has
    underscores for dots."""
    generator, factors = torch.Generator().manual_seed(3), {}
    for weight, value in random_weights(FAMILIES[family]).items():
        if part in weight and weight.endswith(".weight") and value.ndim == 2:
            name = weight.removesuffix(".weight")
            stem = layer.format(name=name, flat=name.replace(".", "_"))
            for end, shape in zip(ends, ((4, value.shape[1]), (value.shape[0], 4))):
                factors[stem + end] = torch.randn(shape, generator=generator) * 0.05
    save_file(factors, path)


def unet_lora(path, family: str):
    """As the trainers of Stable Diffusion name the layers."""
    lora(path, family, "attn1", "lora_unet_{flat}", (".lora_down.weight", ".lora_up.weight"))


def vae(path, module: torch.nn.Module, config: dict | None = None):
    """A VAE of the host with seeded values that keep the size of what passes through them."""
    weights, generator = dict(module.state_dict()), torch.Generator().manual_seed(4)
    for name, value in module.named_parameters():
        if value.ndim > 1 and not name.endswith("gamma"):
            weights[name] = (
                torch.randn(value.shape, generator=generator)
                * (value.shape[0] / value.numel()) ** 0.5
            )
        else:
            weights[name] = torch.full(value.shape,
                                       float(name.endswith(("gamma", "weight", "scale"))))
    for name in (name for name in weights if "per_channel_statistics" in name):
        weights[name] = torch.full(weights[name].shape, float("std" in name))
    save_file({name: value.contiguous() for name, value in weights.items()}, path,
              {"config": json.dumps(config)} if config else None)


def flux2_vae(path):
    """Its encoder has one width; the decoder has a fourth of its own."""
    config = {
        "double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [],
        "dropout": 0.0, "batch_norm_latent": True
    }
    module = comfy.ldm.models.autoencoder.AutoencoderKL(
        ddconfig=config, embed_dim=32, decoder_ddconfig=config | {"ch": 32}
    )
    vae(path, module)


def wan_vae(path):
    vae(
        path,
        comfy.ldm.wan.vae.WanVAE(dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
                                 attn_scales=[], temperal_downsample=[False, True, True],
                                 image_channels=3, conv_out_channels=3, dropout=0.0))


def wan22_vae(path):
    vae(path, comfy.taesd.taehv.TAEHV(latent_channels=48))


def ltx_vae(path):
    one, twice = {"num_layers": 1}, {"residual": True, "multiplier": 2}
    config = {
        "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128,
        "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform",
        "encoder_base_channels": 32, "decoder_base_channels": 32,
        "encoder_blocks": [["res_x", one], *[["compress_all_res", {"multiplier": 2}]] * 3],
        "decoder_blocks": [*[["compress_all", twice]] * 3, ["res_x", one]]
    }
    module = comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE(config=config)
    vae(path, module, {"vae": config})


def audio_vae(path):
    coder = {
        "double_z": True, "mel_bins": 64, "z_channels": 8, "resolution": 256,
        "downsample_time": False, "in_channels": 2, "out_ch": 2, "ch": 128, "ch_mult": [1, 2, 4],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        "mid_block_add_attention": False, "norm_type": "pixel", "causality_axis": "height"
    }
    config = {"audio_vae": {"model": {"params": {"ddconfig": coder, "sampling_rate": 16000}}},
              "vocoder": {"upsample_initial_channel": 64}}
    module = comfy.ldm.lightricks.vae.audio_vae.AudioVAE({"config": config})
    module.add_module("audio_vae", module._modules.pop("autoencoder"))  # the file's name of it
    vae(path, module, config)


def of(write, *arguments, **named):
    return lambda path: write(path, *arguments, **named)


# Name in a workflow -> what writes the small file.
FILES = {
    "flux1-dev-bnb-nf4-v2.safetensors": nf4_checkpoint,
    "flux1-dev.safetensors": flux_bf16,
    "svdq-int4_r32-flux.1-dev.safetensors": svdquant,
    "Qwen-Image-SDNQ-uint4-svd-r32/transformer": qwen_image_folder,
    "flux1-dev-Q4_K_S.gguf": flux_gguf,
    "flux1-dev-Q8_0.gguf": flux_gguf,
    "flux1-kontext-dev-Q4_K_S.gguf": flux_gguf,
    "ae.safetensors": lambda path: save_file(autoencoder(), path),
    "FLUX.1-dev-ControlNet-Union-Pro-2.0.safetensors": controlnet,
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": of(flux_lora, FIRST),
    "FLUX-dev-lora-add_details.safetensors": of(flux_lora, SECOND),
    "flux-2-klein-4b-Q5_K_M.gguf": of(family_gguf, "flux2"),
    "flux-2-klein-4b-outpaint-lora.safetensors": of(lora, "flux2", "attn.proj"),
    "flux2-vae.safetensors": flux2_vae,
    "flux2-dev-Q4_K_M.gguf": of(family_gguf, "flux2"),
    "flux-2-klein-9b-Q4_K_M.gguf": of(family_gguf, "flux2-klein"),
    "Krea-2-Turbo-Q4_K_M.gguf": of(family_gguf, "krea2"),
    "stable-diffusion-v1-5-pruned-emaonly-Q8_0.gguf": stable_diffusion_gguf,
    "lcm-lora-sdv1-5.safetensors": of(unet_lora, "sd1.5"),
    "stable-diffusion-xl-base-1.0-Q8_0.gguf": of(stable_diffusion_gguf, "sdxl",
                                                 with_text_encoder=False),
    "lcm-lora-sdxl.safetensors": of(unet_lora, "sdxl"),
    "pixel-art-xl.safetensors": of(unet_lora, "sdxl"),
    "sd3.5_medium-Q4_K_M.gguf": of(family_gguf, "sd3.5"),
    "sd3.5_vae.safetensors": lambda path: save_file(autoencoder(), path),
    "qwen-image-Q4_K_M.gguf": of(family_gguf, "qwen-image"),
    "qwen-image-edit-2511-Q4_K_M.gguf": of(family_gguf, "qwen-image"),
    "qwen_image_vae.safetensors": wan_vae,
    "z_image_turbo_bf16.safetensors": of(family_bf16, "z-image"),
    "z_image_turbo-Q4_K_M.gguf": of(family_gguf, "z-image"),
    "Wan2.2-TI2V-5B-Q4_K_M.gguf": of(family_gguf, "wan2.2-ti2v"),
    "wan2.1-t2v-14b-Q4_K_M.gguf": of(family_gguf, "wan2.1-t2v"),
    "Wan2_1-VACE_module_14B_fp8_e4m3fn.safetensors": vace_module,
    "wan2.2_vae.safetensors": wan22_vae,
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": of(family_gguf, "wan2.1-t2v"),
    "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf": of(family_gguf, "wan2.1-t2v"),
    "Wan2.2-I2V-A14B-HighNoise-Q4_K_M.gguf": of(family_gguf, "wan2.2-i2v"),
    "Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf": of(family_gguf, "wan2.2-i2v"),
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": of(lora, "wan2.1-t2v",
                                                                      "self_attn"),
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": of(lora, "wan2.1-t2v",
                                                                     "self_attn"),
    "wan_2.1_vae.safetensors": wan_vae,
    "ltx-2-19b-distilled_Q4_K_M.gguf": of(family_gguf, "ltx-2"),
    "LTX2_video_vae_bf16.safetensors": ltx_vae,
    "LTX2_audio_vae_bf16.safetensors": audio_vae,
}
# Widths that the host does not read from these files: the test's server is told them.
FIXED = {family.config["image_model"]: {name: family.config[name] for name in family.fixed}
         for family in (FAMILIES["qwen-image"], FAMILIES["z-image"], FAMILIES["krea2"])}
# Encoders of billions of weights exist in one size: a node of the test gives what they would, of
# this width and with this many pooled values. The one of SD1.5 runs.
TEXT = {
    "flux1": (1024, 0), "svdq-int4_r32-flux.1": (1024, 0), "flux-2": (256, 0),
    "flux2-dev": (256, 0),
    "Krea-2": (512, 0),
    "stable-diffusion-xl": (2048, 1280), "sd3.5": (256, 256), "qwen-image": (256, 0),
    "Qwen-Image": (256, 0), "z_image": (256, 0), "wan2.1": (4096, 0),
    "Wan2.2": (4096, 0), "ltx-2": (512, 0)
}
