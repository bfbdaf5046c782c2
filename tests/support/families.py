"""The host's diffusion models at sizes a test can afford, built from the host's own classes.

A family's weights are random with a fixed seed, under the names the host's model gives them. Their
rows divide by 32 and mostly by 256, so that every format of ggml can pack them.
"""
import dataclasses
import functools
import importlib
import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any
from unittest import mock

import comfy.memory_management
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import pytest
import torch
from pack_api import load_diffusion_model


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One architecture.

    host_class: the class of `patcher.model` the host must choose. supported: the host's entry in
    `supported_models`.
    config: the shrunken configuration. latent, context: shapes of the model's main inputs; no
    latent: the model is not run. extra: further arguments of `apply_model`, a tuple being a shape
    for random values. fixed: the host's own values of what it does not read from a file; such a
    model runs shrunken only with the host's answer corrected. parts: classes of the host whose
    sizes no configuration says -> what they are built with in place of the host's numbers.
    metadata: what the file has to say beside its tensors.
    """

    host_class: str
    supported: str
    config: Mapping[str, Any]
    latent: tuple[int, ...] | None
    context: tuple[int, ...] | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def host_model(family: Family, config: Mapping[str, Any], device: str = "cpu") -> torch.nn.Module:
    """The host's own module for a configuration, as its loader builds it, with uninitialised
    float32 weights."""
    if not hasattr(comfy.supported_models, family.supported):
        pytest.skip(f"this ComfyUI has no diffusion model {family.supported}")
    model_config = getattr(comfy.supported_models, family.supported)({**config})
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = comfy.ops.disable_weight_init
    # with it, layers have no weights until they load
    with mock.patch.object(comfy.memory_management, "aimdo_enabled", False):
        return model_config.get_model({}, "", device=device).diffusion_model


@functools.lru_cache(maxsize=1)
def random_weights(family: Family) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor of the shrunken model."""
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        shrink_parts(family, patch)
        weights = host_model(family, family.config).state_dict()
    for name, param in weights.items():
        values = torch.randn(param.shape, generator=generator)
        if param.ndim > 1:
            values *= min(0.05, (param.shape[0] / param.numel()) ** 0.5)
        else:
            values = values * 0.05 + ("norm" in name and not name.endswith("bias"))
        weights[name] = values
    return weights


def full_width_shapes(family: Family) -> dict[str, torch.Size]:
    """Name -> shape of the model with the widths the host insists on."""
    model = host_model(family, {**family.config, **family.fixed}, "meta")
    return {name: value.shape for name, value in model.state_dict().items()}


def shrink_parts(family: Family, monkeypatch):
    """Let the host build the family's parts in the sizes of these tests."""
    for name, sizes in family.parts.items():
        module_name, _, class_name = name.rpartition(".")
        module = importlib.import_module(module_name)

        original = getattr(module, class_name)
        monkeypatch.setattr(module, class_name, functools.partial(_with_sizes, original, sizes))


def _with_sizes(original, sizes: Mapping[str, Any], *args, **options):
    return original(*args, **{**options, **sizes})


def shrunken_detection(family: Family, monkeypatch):
    """Let the host's detection answer with the family's size where it would answer with a size it
    holds fixed."""
    shrink_parts(family, monkeypatch)
    detect = comfy.model_detection.detect_unet_config

    def detect_shrunken(*args, **kwargs):
        config = detect(*args, **kwargs)
        if config is not None:
            config.update({name: family.config[name] for name in family.fixed})
        return config

    if family.fixed:
        monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_shrunken)


def inputs(family: Family) -> dict[str, Any]:
    """Arguments of `apply_model`."""
    generator = torch.Generator().manual_seed(1)

    def value(shape):
        return torch.randn(shape, generator=generator) if isinstance(shape, tuple) else shape

    arguments = {"x": value(family.latent), "t": torch.tensor([0.5])}
    if family.context is not None:
        arguments["c_crossattn"] = value(family.context)
    return arguments | {name: value(shape) for name, shape in family.extra.items()}


def host_patcher(weights: Mapping[str, Any], family: Family,
                 **options) -> comfy.model_patcher.ModelPatcher:
    """What the host's own loader makes of dense weights."""
    weights = {name: torch.as_tensor(values).clone() for name, values in weights.items()}
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options=options,
                                                    metadata=family.metadata)


def run(patcher: comfy.model_patcher.ModelPatcher, family: Family) -> torch.Tensor:
    """What the model adds to its input. The denoised image alone would hide a small error behind
    the input."""
    comfy.model_management.load_models_gpu([patcher])
    arguments, network = inputs(family), patcher.model.diffusion_model
    # HiDream-O1 takes keys and values of a prompt that it had before, though a LoRA has changed
    getattr(network, "clear_kv_cache", lambda: None)()
    with torch.inference_mode():
        return patcher.model.apply_model(**arguments) - arguments["x"]


def deep_clone(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """One with weights of its own, as the host makes it for another device. Skips the test where
    the host makes none."""
    if "force_deepcopy" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI makes no clones for other devices")
    return patcher.clone(force_deepcopy=True)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.isfinite().all() and expected.norm() > 0
    return ((out - expected).norm() / expected.norm()).item()


def comfyui_gguf_style(packed_type: str = "Q8_0") -> dict[str, Any]:
    """Arguments of `write_gguf` for what ComfyUI-GGUF's converter writes: matrices are packed,
    norms and biases are F32."""
    return {
        "type_of": lambda name, values: packed_type
        if values.ndim == 2 else "F32", "architecture": "flux"
    }


def stable_diffusion_cpp_style(packed_type: str = "Q4_0",
                               vector_type: str = "F16") -> dict[str, Any]:
    """What stable-diffusion.cpp writes: every matrix whose rows divide is packed, and no
    architecture is named.

    It also folds the first two of five dimensions into one, which is left to the caller.
    """
    types = {1: vector_type, 2: packed_type}
    return {"type_of": lambda name, values: types.get(values.ndim, "F16"), "architecture": None}


_FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
         "context_in_dim": 256, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
         "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
         "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": []}

_FLUX2 = {"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
          "context_in_dim": 256, "hidden_size": 256, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1,
          "depth_single_blocks": 1, "axes_dim": [32, 32, 32, 32], "theta": 2000, "qkv_bias": False,
          "vec_in_dim": None, "guidance_embed": True, "txt_ids_dims": [3],
          "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
          "default_ref_method": "index", "ref_index_scale": 10.0}

_CHROMA = {name: value for name, value in _FLUX.items() if name != "guidance_embed"} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 256,
    "hidden_dim": 256,
    "n_layers": 1,
}

_SD3 = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 4, "input_size": None,
        "adm_in_channels": 256, "num_patches": 64,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 256,
        "out_features": 256}}, "pos_embed_max_size": 8, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [0]}

_UNET = {"use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True,
         "legacy": False, "in_channels": 4, "out_channels": 4, "model_channels": 320,
         "use_temporal_resblock": False, "use_temporal_attention": False}

_WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 256, "out_dim": 16, "num_heads": 2,
        "ffn_dim": 512, "num_layers": 1, "in_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6}

_HUNYUAN_VIDEO = {"image_model": "hunyuan_video", "in_channels": 16, "patch_size": [1, 2, 2],
                  "out_channels": 16, "vec_in_dim": 768, "axes_dim": [16, 56, 56],
                  "meanflow": False, "context_in_dim": 256, "hidden_size": 256, "mlp_ratio": 4.0,
                  "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256,
                  "qkv_bias": True, "byt5": False, "guidance_embed": True,
                  "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}

_LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256,
           "cap_feat_dim": 256, "n_layers": 2, "qk_norm": True}

_COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16,
           "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256,
           "num_blocks": 1, "num_heads": 2, "concat_padding_mask": True,
           "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop",
           "use_adaln_lora": True, "adaln_lora_dim": 256}

_COSMOS2 = dict(_COSMOS, pos_emb_learnable=True, min_fps=1, max_fps=30,
                extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0,
                rope_w_extrapolation_ratio=4.0, rope_enable_fps_modulation=False)

_LTX2 = {"attention_head_dim": 8, "cross_attention_dim": 256, "audio_attention_head_dim": 8,
         "audio_cross_attention_dim": 256, "caption_channels": 256,
         "connector_attention_head_dim": 64, "connector_num_attention_heads": 4,
         "connector_num_layers": 1, "apply_gated_attention": True, "cross_attention_adaln": True,
         "caption_proj_before_connector": True, "connector_apply_gated_attention": True}

_MINIMAX = {"image_model": "minimax_h3", "num_layers": 1, "token_refiner_num_layers": 1,
            "hidden_size": 256, "latents_dim": 24, "audio_latents_dim": 32,
            "attention_head_dim": 128, "num_attention_heads": 2, "ffn_hidden_size": 256,
            "text_dim": 512, "time_embed_dim": 256, "rope_inv_freq_len": 16}

_MINIMAX_INPUTS = {
    "latent": (1, 1, 1024), "context": (1, 7, 512),
    "extra": {"latent_shapes": [(1, 24, 2, 4, 4), (1, 32, 2, 4)]}}

_HIDREAM_O1 = {
    "text_config_overrides": {
        "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1},
    "vision_config_overrides": {
        "hidden_size": 256, "intermediate_size": 512, "depth": 1, "num_heads": 2}}

FAMILIES = {
    "flux-schnell": Family("comfy.model_base.Flux", "FluxSchnell", _FLUX, latent=(1, 16, 8, 8),
        context=(1, 7, 256)),
    "flux-dev": Family("comfy.model_base.Flux", "Flux",
        {**_FLUX, "vec_in_dim": 768, "guidance_embed": True}, latent=(1, 16, 8, 8),
        context=(1, 7, 256), extra={"y": (1, 768), "guidance": torch.tensor([3.5])}),
    "flux2": Family("comfy.model_base.Flux2", "Flux2", _FLUX2, latent=(1, 128, 4, 4),
        context=(1, 7, 256), extra={"guidance": torch.tensor([3.5])}),
    "flux2-klein": Family("comfy.model_base.Flux2", "Flux2", {**_FLUX2, "guidance_embed": False},
        latent=(1, 128, 4, 4), context=(1, 7, 256)),
    "longcat-image": Family("comfy.model_base.LongCatImage", "LongCatImage",
        {**_FLUX, "context_in_dim": 3584, "txt_ids_dims": [1, 2]}, latent=(1, 16, 8, 8),
        context=(1, 7, 3584)),
    "ovis-image": Family("comfy.model_base.Flux", "FluxSchnell",
        {**_FLUX, "yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]}, latent=(1, 16, 8, 8),
        context=(1, 7, 256)),
    "chroma": Family("comfy.model_base.Chroma", "Chroma", _CHROMA, latent=(1, 16, 8, 8),
        context=(1, 7, 256), extra={"guidance": torch.tensor([0.0])},
        fixed={"out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}),
    "chroma-radiance": Family("comfy.model_base.ChromaRadiance", "ChromaRadiance",
        {**_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3,
            "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 1, "nerf_depth": 2,
            "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False},
        latent=(1, 3, 32, 32), context=(1, 7, 256), extra={"guidance": torch.tensor([0.0])},
        fixed={"out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, "nerf_mlp_ratio": 4,
            "nerf_depth": 4}),
    "sd3.5": Family("comfy.model_base.SD3", "SD3", _SD3, latent=(1, 16, 8, 8), context=(1, 7, 256),
        extra={"y": (1, 256)}),
    "sd1.5": Family("comfy.model_base.BaseModel", "SD15",
        {**_UNET, "adm_in_channels": None, "num_res_blocks": [1], "channel_mult": [1],
            "transformer_depth": [1], "transformer_depth_output": [0, 1],
            "transformer_depth_middle": -2, "use_linear_in_transformer": False, "context_dim": 768},
        latent=(1, 4, 8, 8), context=(1, 7, 768)),
    # KOALA-700M's depths: the smallest with which the host says SDXL
    "sdxl": Family("comfy.model_base.SDXL", "KOALA_700M",
        {**_UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 1, 1], "transformer_depth": [0, 2, 5],
            "transformer_depth_output": [0] * 6, "transformer_depth_middle": -2,
            "use_linear_in_transformer": True, "context_dim": 2048}, latent=(1, 4, 8, 8),
        context=(1, 7, 2048), extra={"y": (1, 2816)}),
    "wan2.1-t2v": Family("comfy.model_base.WAN21", "WAN21_T2V", _WAN, latent=(1, 16, 2, 4, 4),
        context=(1, 7, 4096)),
    "wan2.1-i2v": Family("comfy.model_base.WAN21", "WAN21_I2V",
        {**_WAN, "model_type": "i2v", "in_dim": 36}, latent=(1, 16, 2, 4, 4), context=(1, 7, 4096),
        extra={"c_concat": (1, 20, 2, 4, 4), "clip_fea": (1, 5, 1280)}),
    "wan2.1-vace": Family("comfy.model_base.WAN21_Vace", "WAN21_Vace",
        {**_WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        latent=(1, 16, 2, 4, 4), context=(1, 7, 4096),
        extra={"vace_context": (1, 1, 96, 2, 4, 4), "vace_strength": [1.0]}),
    "wan2.1-camera": Family("comfy.model_base.WAN21_Camera", "WAN21_Camera",
        {**_WAN, "model_type": "camera", "in_dim": 32}, latent=(1, 16, 2, 4, 4),
        context=(1, 7, 4096),
        extra={"c_concat": (1, 16, 2, 4, 4), "clip_fea": (1, 5, 1280),
            "camera_conditions": (1, 24, 2, 32, 32)}),
    "wan2.1-humo": Family("comfy.model_base.WAN21_HuMo", "WAN21_HuMo",
        {**_WAN, "model_type": "humo", "in_dim": 36}, latent=None, context=None),
    "wan2.2-animate": Family("comfy.model_base.WAN22_Animate", "WAN22_Animate",
        {**_WAN, "model_type": "animate", "in_dim": 36, "num_layers": 5}, latent=None,
        context=None),
    "wan2.2-s2v": Family("comfy.model_base.WAN22_S2V", "WAN22_S2V",
        {**_WAN, "model_type": "s2v", "num_layers": 40}, latent=None, context=None),
    "wan2.2-ti2v": Family("comfy.model_base.WAN22", "WAN22_T2V",
        {**_WAN, "in_dim": 48, "out_dim": 48}, latent=(1, 48, 2, 4, 4), context=(1, 7, 4096)),
    "hunyuan-video": Family("comfy.model_base.HunyuanVideo", "HunyuanVideo", _HUNYUAN_VIDEO,
        latent=(1, 16, 2, 4, 4), context=(1, 7, 256),
        extra={"y": (1, 768), "guidance": torch.tensor([6.0])}),
    "hunyuan-image": Family("comfy.model_base.HunyuanImage21", "HunyuanImage21",
        {**_HUNYUAN_VIDEO, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1],
            "axes_dim": [64, 64], "vec_in_dim": None, "byt5": True}, latent=(1, 64, 4, 4),
        context=(1, 7, 256), extra={"txt_byt5": (1, 5, 1472), "guidance": torch.tensor([6.0])}),
    "hunyuan-video-1.5": Family("comfy.model_base.HunyuanVideo15", "HunyuanVideo15",
        {**_HUNYUAN_VIDEO, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1],
            "vec_in_dim": None, "guidance_embed": False, "byt5": True,
            "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True},
        latent=(1, 32, 2, 4, 4), context=(1, 7, 256),
        extra={"c_concat": (1, 33, 2, 4, 4), "txt_byt5": (1, 5, 1472), "clip_fea": (1, 5, 1152)}),
    "ltxv": Family("comfy.model_base.LTXV", "LTXV",
        {"image_model": "ltxv", "num_layers": 1, "attention_head_dim": 8,
            "cross_attention_dim": 256}, latent=(1, 128, 2, 4, 4), context=(1, 7, 4096),
        extra={"attention_mask": None, "frame_rate": 25}),
    # with the additions of 2.3; its sizes come from the file's metadata
    "ltx-2": Family("comfy.model_base.LTXAV", "LTXAV",
        dict(image_model="ltxav", num_layers=1, **_LTX2), latent=(1, 1, 4608), context=(1, 7, 512),
        extra={"latent_shapes": [(1, 128, 2, 4, 4), (1, 8, 4, 16)], "attention_mask": None,
            "frame_rate": 25}, metadata={"config": json.dumps({"transformer": _LTX2})}),
    "aura-flow": Family("comfy.model_base.AuraFlow", "AuraFlow",
        {"max_seq": 64, "cond_seq_dim": 2048, "n_double_layers": 1, "n_layers": 2, "dim": 256,
            "n_heads": 1, "global_conddim": 256}, latent=(1, 4, 8, 8), context=(1, 7, 2048),
        fixed={"dim": 3072, "n_heads": 12, "global_conddim": 3072}),
    # at full width: the host's table of diffusers' names holds it fixed too
    "pixart-sigma": Family("comfy.model_base.PixArt", "PixArtSigma",
        {"image_model": "pixart_sigma", "num_heads": 16, "patch_size": 2, "hidden_size": 1152,
            "in_channels": 4, "depth": 1, "model_max_length": 300, "micro_condition": False},
        latent=(1, 4, 40, 40), context=(1, 7, 4096)),
    "hunyuan-dit": Family("comfy.model_base.HunyuanDiT", "HunyuanDiT",
        {"image_model": "hydit", "depth": 2, "hidden_size": 256, "num_heads": 2,
            "text_states_dim": 256, "text_states_dim_t5": 256}, latent=(1, 4, 8, 8),
        context=(1, 77, 256),
        extra={"text_embedding_mask": torch.ones(1, 77), "encoder_hidden_states_t5": (1, 256, 256),
            "text_embedding_mask_t5": torch.ones(1, 256),
            "image_meta_size": torch.full((1, 6), 1024.0)},
        fixed={"num_heads": 16, "text_states_dim": 1024, "text_states_dim_t5": 2048}),
    "mochi": Family("comfy.model_base.GenmoMochi", "GenmoMochi",
        {"image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2,
            "hidden_size_x": 256, "hidden_size_y": 128, "mlp_ratio_x": 48.0, "mlp_ratio_y": 4.0,
            "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
            "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
            "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
            "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 256, "t5_token_length": 8,
            "rope_theta": 10000.0}, latent=(1, 12, 2, 4, 4), context=(1, 8, 256),
        extra={"attention_mask": torch.ones(1, 8), "num_tokens": 8},
        fixed={"depth": 48, "num_heads": 24, "hidden_size_x": 3072, "hidden_size_y": 1536,
            "mlp_ratio_x": 4.0, "t5_feat_dim": 4096, "t5_token_length": 256}),
    "lumina2": Family("comfy.model_base.Lumina2", "Lumina2",
        {**_LUMINA, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 48, 48],
            "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed={"dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0}),
    "z-image": Family("comfy.model_base.Lumina2", "ZImage",
        {**_LUMINA, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed={"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}),
    "qwen-image": Family("comfy.model_base.QwenImage", "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "num_attention_heads": 2,
            "joint_attention_dim": 256}, latent=(1, 16, 1, 8, 8), context=(1, 7, 256),
        fixed={"num_attention_heads": 24, "joint_attention_dim": 3584}),
    "mage-flow": Family("comfy.model_base.MageFlow", "MageFlow",
        {"image_model": "mage_flow", "in_channels": 128, "num_layers": 1, "num_attention_heads": 2},
        latent=(1, 128, 4, 4), context=(1, 7, 2560), fixed={"num_attention_heads": 24}),
    "joyimage": Family("comfy.model_base.JoyImage", "JoyImage",
        {"image_model": "joyimage", "in_channels": 16, "hidden_size": 256, "patch_size": [1, 2, 2],
            "num_layers": 1, "num_attention_heads": 2, "text_dim": 4096}, latent=(1, 16, 1, 8, 8),
        context=(1, 7, 4096)),
    "hidream": Family("comfy.model_base.HiDream", "HiDream",
        {"image_model": "hidream", "attention_head_dim": 128, "axes_dims_rope": [64, 32, 32],
            "caption_channels": [256, 256], "max_resolution": [128, 128], "in_channels": 16,
            "llama_layers": [0, 1], "num_attention_heads": 2, "num_routed_experts": 4,
            "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
            "patch_size": 2, "text_emb_dim": 256}, latent=(1, 16, 8, 8), context=(1, 7, 256),
        extra={"y": (1, 256), "encoder_hidden_states_llama3": (1, 2, 7, 256)},
        fixed={"caption_channels": [4096, 4096], "llama_layers": [*range(32), *[31] * 16],
            "num_attention_heads": 20, "num_layers": 16, "num_single_layers": 32,
            "text_emb_dim": 2048}),
    "omnigen2": Family("comfy.model_base.Omnigen2", "Omnigen2",
        {"image_model": "omnigen2", "axes_dim_rope": [40, 40, 40], "axes_lens": [1024, 1664, 1664],
            "ffn_dim_multiplier": None, "hidden_size": 480, "in_channels": 16, "multiple_of": 256,
            "norm_eps": 1e-5, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 1,
            "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 256,
            "timestep_scale": 1000.0}, latent=(1, 16, 8, 8), context=(1, 7, 256),
        extra={"num_tokens": 7},
        fixed={"hidden_size": 2520, "num_attention_heads": 21, "num_kv_heads": 7, "num_layers": 32,
            "num_refiner_layers": 2, "text_feat_dim": 2048}),
    "cosmos-predict2": Family("comfy.model_base.CosmosPredict2", "CosmosT2IPredict2",
        {**_COSMOS2, "image_model": "cosmos_predict2"}, latent=(1, 16, 1, 8, 8),
        context=(1, 7, 1024), fixed={"model_channels": 2048, "num_blocks": 28, "num_heads": 16}),
    "anima": Family("comfy.model_base.Anima", "Anima",
        {**_COSMOS2, "image_model": "anima", "crossattn_emb_channels": 256},
        latent=(1, 16, 1, 8, 8), context=(1, 7, 256),
        extra={"t5xxl_ids": torch.arange(7)[None], "t5xxl_weights": torch.ones(1, 7, 1)},
        fixed={"model_channels": 2048, "num_blocks": 28, "num_heads": 16,
            "crossattn_emb_channels": 1024},
        parts={
            "comfy.ldm.anima.model.LLMAdapter": {"source_dim": 256, "target_dim": 256,
                "model_dim": 256, "num_layers": 2, "num_heads": 4}}),
    "cosmos": Family("comfy.model_base.CosmosVideo", "CosmosT2V",
        {**_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
            "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable"}, latent=(1, 16, 1, 8, 8),
        context=(1, 7, 1024), extra={"fps": None},
        fixed={"model_channels": 4096, "num_blocks": 28, "num_heads": 32}),
    "kandinsky5": Family("comfy.model_base.Kandinsky5", "Kandinsky5",
        {"image_model": "kandinsky5", "model_dim": 256, "time_dim": 256, "ff_dim": 512,
            "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 1},
        latent=(1, 16, 1, 8, 8), context=(1, 7, 3584),
        extra={"y": (1, 768), "c_concat": (1, 17, 1, 8, 8)}),
    "ace-step": Family("comfy.model_base.ACEStep", "ACEStep",
        {"audio_model": "ace", "attention_head_dim": 128, "in_channels": 8, "inner_dim": 256,
            "max_height": 16, "max_position": 1024, "max_width": 32768, "mlp_ratio": 2.5,
            "num_attention_heads": 2, "num_layers": 1, "out_channels": 8, "patch_size": [16, 1],
            "rope_theta": 1e6, "speaker_embedding_dim": 512, "text_embedding_dim": 256,
            "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [256, 256],
            "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 64,
            "lyric_hidden_size": 256}, latent=(1, 8, 16, 8), context=(1, 7, 256),
        extra={"lyric_token_idx": torch.arange(9)[None], "speaker_embeds": (1, 512),
            "lyrics_strength": 1.0},
        fixed={"inner_dim": 2560, "max_position": 32768, "num_attention_heads": 20,
            "num_layers": 24, "text_embedding_dim": 768, "ssl_latent_dims": [1024, 768],
            "lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024},
        parts={
            "comfy.ldm.ace.model.LyricEncoder": {"output_size": 256, "attention_heads": 4,
                "linear_units": 512, "num_blocks": 2}}),
    "ace-step-1.5": Family("comfy.model_base.ACEStep15", "ACEStep15",
        {"audio_model": "ace1.5", "hidden_size": 256, "intermediate_size": 256, "num_heads": 8,
            "encoder_hidden_size": 256, "encoder_num_heads": 8, "encoder_intermediate_size": 256,
            "num_dit_layers": 1, "fsq_dim": 256}, latent=(1, 64, 10), context=(1, 7, 1024),
        extra={"lyric_embed": (1, 5, 1024), "refer_audio": (1, 64, 10), "is_covers": False},
        fixed={"encoder_hidden_size": 2048, "fsq_dim": 2048}),
    "ernie-image": Family("comfy.model_base.ErnieImage", "ErnieImage",
        {"image_model": "ernie", "hidden_size": 256, "num_attention_heads": 2, "num_layers": 1,
            "ffn_hidden_size": 512, "text_in_dim": 512}, latent=(1, 128, 4, 4), context=(1, 7, 512),
        fixed={"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36,
            "ffn_hidden_size": 12288, "text_in_dim": 3072}),
    "krea2": Family("comfy.model_base.Krea2", "Krea2",
        {"image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 1,
            "heads": 2, "kvheads": 1, "txtlayers": 2, "txtdim": 256, "txtheads": 2,
            "txtkvheads": 2}, latent=(1, 16, 1, 8, 8), context=(1, 7, 512),
        fixed={"txtdim": 2560, "txtheads": 20, "txtkvheads": 20}),
    "boogu": Family("comfy.model_base.Boogu", "Boogu",
        {"image_model": "boogu", "hidden_size": 480, "num_layers": 1, "num_double_stream_layers": 1,
            "num_refiner_layers": 1, "instruction_feat_dim": 256, "num_attention_heads": 4,
            "num_kv_heads": 2}, latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed={"hidden_size": 3360, "num_attention_heads": 28, "num_kv_heads": 7}),
    "lens": Family("comfy.model_base.Lens", "Lens",
        {"image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 1,
            "num_attention_heads": 4, "enc_hidden_dim": 256, "multi_layer_encoder_feature": True,
            "selected_layer_index": (0, 1)}, latent=(1, 128, 4, 4), context=(1, 7, 512)),
    # the host counts no layers: it looks for the name of the last
    # without a context it runs with the texts that are in the file
    "seedvr2-3b": Family("comfy.model_base.SeedVR2", "SeedVR2",
        {"image_model": "seedvr2", "vid_dim": 128, "heads": 1, "num_layers": 32, "norm_eps": 1e-5,
            "mlp_type": "swiglu", "vid_out_norm": True}, latent=(1, 16, 2, 8, 8), context=None,
        extra={"condition": (1, 17, 2, 8, 8), "transformer_options": {"cond_or_uncond": [0]}},
        fixed={"vid_dim": 2560, "heads": 20}),
    "seedvr2-7b": Family("comfy.model_base.SeedVR2", "SeedVR2",
        {"image_model": "seedvr2", "vid_dim": 3072, "heads": 24, "num_layers": 36, "mm_layers": 36,
            "norm_eps": 1e-5, "rope_type": "rope3d", "rope_dim": 64, "mlp_type": "normal"},
        latent=None, context=None),
    "ideogram4": Family("comfy.model_base.Ideogram4", "Ideogram4",
        {"image_model": "ideogram4", "in_channels": 128, "num_layers": 1}, latent=(1, 128, 4, 4),
        context=(1, 7, 256),
        parts={
            "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": {"num_attention_heads": 1,
                "intermediate_size": 512, "adaln_dim": 256, "llm_features_dim": 256}}),
    "minimax-h3": Family("comfy.model_base.MiniMaxH3", "MiniMaxH3",
        {**_MINIMAX, "timestep_input_dim": 256, "time_embed_hidden_size": 256}, **_MINIMAX_INPUTS),
    "minimax-h3-pruned": Family("comfy.model_base.MiniMaxH3", "MiniMaxH3",
        {**_MINIMAX, "adaln_curve_grid": 16}, **_MINIMAX_INPUTS),
    "hidream-o1": Family("comfy.model_base.HiDreamO1", "HiDreamO1",
        {"image_model": "hidream_o1", **_HIDREAM_O1}, latent=(1, 3, 64, 64), context=None,
        extra={"input_ids": torch.tensor([[5, 6, 7, 8]]),
            "position_ids": torch.arange(8).expand(1, 3, 8), "ar_len": 3},
        fixed={"text_config_overrides": {}, "vision_config_overrides": {}}),
    "hunyuan3d-2": Family("comfy.model_base.Hunyuan3Dv2", "Hunyuan3Dv2",
        {"image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 256, "hidden_size": 256,
            "mlp_ratio": 4.0, "num_heads": 16, "depth": 1, "depth_single_blocks": 1,
            "qkv_bias": True, "guidance_embed": False}, latent=(1, 64, 8), context=(1, 7, 256)),
    "cogvideox": Family("comfy.model_base.CogVideoX", "CogVideoX_T2V",
        {"image_model": "cogvideox", "num_attention_heads": 4, "attention_head_dim": 64,
            "time_embed_dim": 256, "num_layers": 1, "in_channels": 16, "patch_size": 2,
            "text_embed_dim": 256, "use_learned_positional_embeddings": False,
            "use_rotary_positional_embeddings": True}, latent=(1, 16, 2, 8, 8),
        context=(1, 7, 256)),
}


def load_without_complaint(path, caplog):
    """What the pack makes of a file, of which the host misses and leaves over nothing."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        patcher = load_diffusion_model(str(path))
    complaints = ("unet missing", "unet unexpected", "left over keys")
    assert not [
        record.getMessage()
        for record in caplog.records
        if record.getMessage().startswith(complaints)
    ]
    return patcher
