"""Models to hold LoRAs against: the host's own classes at their real sizes, without values; and
LoRA files for them."""
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import torch

_UNET = {"use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True,
         "legacy": False, "in_channels": 4, "out_channels": 4, "model_channels": 320,
         "use_temporal_resblock": False, "use_temporal_attention": False}
_FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
         "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
         "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000,
         "qkv_bias": True, "vec_in_dim": 768, "guidance_embed": True, "txt_ids_dims": []}
_FLUX2 = {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
          "mlp_ratio": 3.0, "axes_dim": [32, 32, 32, 32], "theta": 2000, "qkv_bias": False,
          "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [3],
          "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
          "default_ref_method": "index", "ref_index_scale": 10.0}

# name -> (class in comfy.supported_models, its configuration as the host's detection reads it from
# the published files)
MODELS = {
    "SD1.5": ("SD15", {
        **_UNET, "adm_in_channels": None, "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1] * 6 + [0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768,
        "num_heads": 8
    }), "SDXL": ("SDXL", {
        **_UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2] * 3,
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
        "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64
    }), "Flux.1": ("Flux", _FLUX), "Flux.2 dev": ("Flux2", {
        **_FLUX2, "hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48,
        "context_in_dim": 15360, "guidance_embed": True
    }), "Flux.2 Klein 4B": ("Flux2", {
        **_FLUX2, "hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 20,
        "context_in_dim": 7680
    }), "Flux.2 Klein 9B": ("Flux2", {
        **_FLUX2, "hidden_size": 4096, "num_heads": 32, "depth": 8, "depth_single_blocks": 24,
        "context_in_dim": 12288
    })
}


def empty_model(name: str, **changes) -> comfy.model_patcher.ModelPatcher:
    """A model of `MODELS` on the meta device; changes: to its configuration, to shrink it."""
    supported, config = MODELS[name]
    return empty_model_of(supported, {**config, **changes})


def empty_model_of(supported: str, config: dict) -> comfy.model_patcher.ModelPatcher:
    """A model on the meta device: class in comfy.supported_models, and its configuration."""
    model_config = getattr(comfy.supported_models, supported)(dict(config))
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = comfy.ops.disable_weight_init
    model = model_config.get_model({}, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def empty_clip(name: str) -> comfy.sd.CLIP:
    """The CLIP of SD1.5 or SDXL on the meta device."""
    classes = {"SD1.5": comfy.sd1_clip.SD1ClipModel, "SDXL": comfy.sdxl_clip.SDXLClipModel}
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = classes[name](device="meta", dtype=torch.float32)
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, torch.device("cpu"),
                                                    torch.device("cpu"))
    clip.tokenizer, clip.layer_idx, clip.tokenizer_options = None, None, {}
    clip.use_clip_schedule = clip.apply_hooks_to_conds = None
    return clip


def weight_shapes(module: torch.nn.Module, *parts: str) -> dict[str, torch.Size]:
    """Name without `.weight` -> shape of the matrices and kernels whose names contain one of
    `parts`."""
    return {
        name.removesuffix(".weight"): param.shape
        for name, param in module.named_parameters()
        if param.ndim > 1
        and name.endswith(".weight")
        and (not parts or any(part in name for part in parts))
    }


def pairs(shapes: dict[str, tuple], down: str = ".lora_down.weight", up: str = ".lora_up.weight",
          rank: int = 1, alpha: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA: layer name as in the file -> its two factors (and alpha). Kernels get factors as
    kohya's LoCon writes them."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, shape in shapes.items():
        ones = [1] * (len(shape) - 2)
        lora[name + down] = torch.randn(rank, *shape[1:], generator=generator) * 0.02
        lora[name + up] = torch.randn(shape[0], rank, *ones, generator=generator) * 0.02
        if alpha:
            lora[f"{name}.alpha"] = torch.tensor(float(rank))
    return lora


def peft(shapes: dict[str, tuple], **options) -> dict[str, torch.Tensor]:
    return pairs(shapes, ".lora_A.weight", ".lora_B.weight", **options)
