"""The host's diffusion models at sizes a test can afford, built from the host's own classes.

A family's weights are random with a fixed seed, under the names the host's model gives them. Rows divide by 32 and mostly
by 256, so that every format of ggml can pack them.
"""
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.supported_models
import torch


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    host_class: the class of `patcher.model` the host must choose. supported: the host's entry in `supported_models`.
    config: the shrunken configuration. latent, context: shapes of the model's main inputs; no latent: the model is not run.
    extra: further arguments of `apply_model`, a tuple being a shape for random values. fixed: names in `config` whose value
    the host does not read from a file; such a model runs only with the host's answer corrected (`shrunken_detection`).
    metadata: what the file has to say beside its tensors. heavy: too large for every run, though shrunken.
    """

    host_class: str
    supported: str
    config: Mapping[str, Any]
    latent: tuple[int, ...] | None
    context: tuple[int, ...] | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heavy: bool = False


def host_model(family: Family, config: Mapping[str, Any], device: str = "cpu") -> torch.nn.Module:
    """The host's own module for a configuration, as its loader builds it, with uninitialised float32 weights."""
    model_config = getattr(comfy.supported_models, family.supported)({**config})
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = comfy.ops.disable_weight_init
    return model_config.get_model({}, "", device=device).diffusion_model


def random_weights(family: Family) -> dict[str, torch.Tensor]:
    """Name -> float32 tensor of the shrunken model."""
    generator = torch.Generator().manual_seed(0)
    model = host_model(family, family.config)
    weights = model.state_dict()  # buffers keep their values
    for name, param in model.named_parameters():
        values = torch.randn(param.shape, generator=generator)
        if param.ndim > 1:
            values *= min(0.05, (param.shape[0] / param.numel()) ** 0.5)
        else:
            values = values * 0.05 + ("norm" in name and not name.endswith("bias"))
        weights[name] = values
    return weights


def full_width_shapes(family: Family) -> dict[str, torch.Size]:
    """Name -> shape of the model with the few blocks of the shrunken one and the widths the host insists on."""
    shrunken = host_model(family, family.config, "meta").state_dict()
    config = comfy.model_detection.detect_unet_config(shrunken, "")
    return {name: value.shape for name, value in host_model(family, config, "meta").state_dict().items()}


def shrunken_detection(family: Family, monkeypatch):
    """Let the host's detection answer with the family's size where it would answer with a size it holds fixed."""
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


_FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, context_in_dim=256, hidden_size=256,
    mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True,
    vec_in_dim=None, guidance_embed=False, txt_ids_dims=[])

_FLUX2 = dict(
    image_model="flux2", in_channels=128, out_channels=128, patch_size=1, context_in_dim=256, hidden_size=256,
    mlp_ratio=3.0, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=[32, 32, 32, 32], theta=2000, qkv_bias=False,
    vec_in_dim=None, guidance_embed=True, txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
    default_ref_method="index", ref_index_scale=10.0)

_CHROMA = {name: value for name, value in _FLUX.items() if name != "guidance_embed"} | dict(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=256, hidden_dim=256, n_layers=1)

_SD3 = dict(
    in_channels=16, out_channels=16, patch_size=2, depth=4, input_size=None, adm_in_channels=256, num_patches=64,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 256, "out_features": 256}},
    pos_embed_max_size=8, pos_embed_scaling_factor=None, qk_norm="rms", x_block_self_attn_layers=[0])

_UNET = dict(
    use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, in_channels=4, out_channels=4,
    model_channels=320, use_temporal_resblock=False, use_temporal_attention=False)

_WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=256, out_dim=16, num_heads=2, ffn_dim=512, num_layers=1, in_dim=16,
    patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6)

_HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768,
    axes_dim=[16, 56, 56], meanflow=False, context_in_dim=256, hidden_size=256, mlp_ratio=4.0, num_heads=2, depth=1,
    depth_single_blocks=1, theta=256, qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False,
    vision_in_dim=None, meanflow_sum=False)

_LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=256, cap_feat_dim=256, n_layers=2, qk_norm=True)

_COSMOS = dict(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    model_channels=256, num_blocks=1, num_heads=2, concat_padding_mask=True, crossattn_emb_channels=1024,
    pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
    use_adaln_lora=True, adaln_lora_dim=256, extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0,
    rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0, extra_h_extrapolation_ratio=1.0,
    extra_w_extrapolation_ratio=1.0, extra_t_extrapolation_ratio=1.0, rope_enable_fps_modulation=False)

_KANDINSKY = dict(
    image_model="kandinsky5", model_dim=256, axes_dims=(16, 24, 24), time_dim=256, ff_dim=512, visual_embed_dim=132,
    num_text_blocks=1, num_visual_blocks=1)

_LTX2 = dict(
    attention_head_dim=8, cross_attention_dim=256, audio_attention_head_dim=8, audio_cross_attention_dim=256,
    caption_channels=256, connector_attention_head_dim=64, connector_num_attention_heads=4, connector_num_layers=1,
    apply_gated_attention=True, cross_attention_adaln=True, caption_proj_before_connector=True,
    connector_apply_gated_attention=True)

FAMILIES = {
    "flux-schnell": Family(
        "comfy.model_base.Flux", "FluxSchnell", _FLUX, latent=(1, 16, 8, 8), context=(1, 7, 256)),
    "flux-dev": Family(
        "comfy.model_base.Flux", "Flux", {**_FLUX, "vec_in_dim": 256, "guidance_embed": True},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"y": (1, 256), "guidance": torch.tensor([3.5])}),
    "flux2": Family(
        "comfy.model_base.Flux2", "Flux2", _FLUX2, latent=(1, 128, 4, 4), context=(1, 7, 256),
        extra={"guidance": torch.tensor([3.5])}),
    "longcat-image": Family(
        "comfy.model_base.LongCatImage", "LongCatImage", {**_FLUX, "context_in_dim": 3584, "txt_ids_dims": [1, 2]},
        latent=(1, 16, 8, 8), context=(1, 7, 3584)),
    "ovis-image": Family(
        "comfy.model_base.Flux", "FluxSchnell", {**_FLUX, "yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]},
        latent=(1, 16, 8, 8), context=(1, 7, 256)),
    "chroma": Family(
        "comfy.model_base.Chroma", "Chroma", _CHROMA, latent=(1, 16, 8, 8), context=(1, 7, 256),
        extra={"guidance": torch.tensor([0.0])}, fixed=("out_dim", "hidden_dim", "n_layers")),
    "sd3.5": Family(
        "comfy.model_base.SD3", "SD3", _SD3, latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"y": (1, 256)}),
    "sd1.5": Family(
        "comfy.model_base.BaseModel", "SD15",
        {**_UNET, "adm_in_channels": None, "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
         "transformer_depth_output": [0, 1], "transformer_depth_middle": -2, "use_linear_in_transformer": False,
         "context_dim": 768},
        latent=(1, 4, 8, 8), context=(1, 7, 768)),
    "sdxl": Family(  # KOALA-700M's depths: the smallest with which the host says SDXL
        "comfy.model_base.SDXL", "KOALA_700M",
        {**_UNET, "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [1, 1, 1],
         "channel_mult": [1, 1, 1], "transformer_depth": [0, 2, 5], "transformer_depth_output": [0] * 6,
         "transformer_depth_middle": -2, "use_linear_in_transformer": True, "context_dim": 2048},
        latent=(1, 4, 8, 8), context=(1, 7, 2048), extra={"y": (1, 2816)}),
    "wan2.1-t2v": Family(
        "comfy.model_base.WAN21", "WAN21_T2V", _WAN, latent=(1, 16, 2, 4, 4), context=(1, 7, 4096)),
    "wan2.1-i2v": Family(
        "comfy.model_base.WAN21", "WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36},
        latent=(1, 16, 2, 4, 4), context=(1, 7, 4096), extra={"c_concat": (1, 20, 2, 4, 4), "clip_fea": (1, 5, 1280)}),
    "wan2.1-vace": Family(
        "comfy.model_base.WAN21_Vace", "WAN21_Vace",
        {**_WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
        latent=(1, 16, 2, 4, 4), context=(1, 7, 4096), extra={"vace_context": (1, 1, 96, 2, 4, 4), "vace_strength": [1.0]}),
    "wan2.1-camera": Family(
        "comfy.model_base.WAN21_Camera", "WAN21_Camera", {**_WAN, "model_type": "camera", "in_dim": 32},
        latent=(1, 16, 2, 4, 4), context=(1, 7, 4096),
        extra={"c_concat": (1, 16, 2, 4, 4), "clip_fea": (1, 5, 1280), "camera_conditions": (1, 24, 2, 32, 32)}),
    "wan2.1-humo": Family(
        "comfy.model_base.WAN21_HuMo", "WAN21_HuMo", {**_WAN, "model_type": "humo", "in_dim": 36},
        latent=None, context=None),
    "wan2.2-animate": Family(
        "comfy.model_base.WAN22_Animate", "WAN22_Animate", {**_WAN, "model_type": "animate", "in_dim": 36},
        latent=None, context=None),
    "wan2.2-s2v": Family(
        "comfy.model_base.WAN22_S2V", "WAN22_S2V", {**_WAN, "model_type": "s2v", "num_layers": 40},
        latent=None, context=None),
    "wan2.2-ti2v": Family(
        "comfy.model_base.WAN22", "WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48},
        latent=(1, 48, 2, 4, 4), context=(1, 7, 4096)),
    "hunyuan-video": Family(
        "comfy.model_base.HunyuanVideo", "HunyuanVideo", _HUNYUAN_VIDEO, latent=(1, 16, 2, 4, 4), context=(1, 7, 256),
        extra={"y": (1, 768), "guidance": torch.tensor([6.0])}),
    "hunyuan-image": Family(
        "comfy.model_base.HunyuanImage21", "HunyuanImage21",
        {**_HUNYUAN_VIDEO, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [64, 64],
         "vec_in_dim": None, "byt5": True},
        latent=(1, 64, 4, 4), context=(1, 7, 256), extra={"txt_byt5": (1, 5, 1472), "guidance": torch.tensor([6.0])}),
    "hunyuan-video-1.5": Family(
        "comfy.model_base.HunyuanVideo15", "HunyuanVideo15",
        {**_HUNYUAN_VIDEO, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
         "guidance_embed": False, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152,
         "meanflow_sum": True},
        latent=(1, 32, 2, 4, 4), context=(1, 7, 256),
        extra={"c_concat": (1, 33, 2, 4, 4), "txt_byt5": (1, 5, 1472), "clip_fea": (1, 5, 1152)}),
    "ltxv": Family(
        "comfy.model_base.LTXV", "LTXV",
        dict(image_model="ltxv", num_layers=1, attention_head_dim=8, cross_attention_dim=256),
        latent=(1, 128, 2, 4, 4), context=(1, 7, 4096), extra={"attention_mask": None, "frame_rate": 25}),
    "ltx-2": Family(  # with the additions of 2.3; its sizes come from the file's metadata
        "comfy.model_base.LTXAV", "LTXAV", dict(image_model="ltxav", num_layers=1, **_LTX2),
        latent=(1, 1, 4608), context=(1, 7, 512),
        extra={"latent_shapes": [(1, 128, 2, 4, 4), (1, 8, 4, 16)], "attention_mask": None, "frame_rate": 25},
        metadata={"config": json.dumps({"transformer": _LTX2})}),
    "aura-flow": Family(
        "comfy.model_base.AuraFlow", "AuraFlow",
        dict(max_seq=64, cond_seq_dim=2048, n_double_layers=1, n_layers=2, dim=256, n_heads=1, global_conddim=256),
        latent=(1, 4, 8, 8), context=(1, 7, 2048), fixed=("dim", "n_heads", "global_conddim")),
    "pixart-sigma": Family(
        "comfy.model_base.PixArt", "PixArtSigma",
        dict(image_model="pixart_sigma", num_heads=2, patch_size=2, hidden_size=256, in_channels=4, depth=1,
             model_max_length=300, micro_condition=False),
        latent=(1, 4, 64, 64), context=(1, 7, 4096), fixed=("num_heads", "hidden_size")),
    "hunyuan-dit": Family(
        "comfy.model_base.HunyuanDiT", "HunyuanDiT",
        dict(image_model="hydit", depth=2, hidden_size=256, num_heads=2),
        latent=(1, 4, 8, 8), context=(1, 77, 1024),
        extra={"text_embedding_mask": torch.ones(1, 77), "encoder_hidden_states_t5": (1, 256, 2048),
               "text_embedding_mask_t5": torch.ones(1, 256), "image_meta_size": torch.full((1, 6), 1024.0)},
        fixed=("num_heads",)),
    "mochi": Family(
        "comfy.model_base.GenmoMochi", "GenmoMochi",
        dict(image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=256, hidden_size_y=128,
             mlp_ratio_x=48.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
             out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
             attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=256, t5_token_length=8,
             rope_theta=10000.0),
        latent=(1, 12, 2, 4, 4), context=(1, 8, 256), extra={"attention_mask": torch.ones(1, 8), "num_tokens": 8},
        fixed=("depth", "num_heads", "hidden_size_x", "hidden_size_y", "mlp_ratio_x", "t5_feat_dim", "t5_token_length")),
    "lumina2": Family(
        "comfy.model_base.Lumina2", "Lumina2",
        {**_LUMINA, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 48, 48], "axes_lens": [300, 512, 512],
         "rope_theta": 10000.0, "ffn_dim_multiplier": 1.0},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed=("n_heads", "n_kv_heads", "axes_dims", "axes_lens", "rope_theta", "ffn_dim_multiplier")),
    "z-image": Family(
        "comfy.model_base.Lumina2", "ZImage",
        {**_LUMINA, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
         "rope_theta": 256.0, "ffn_dim_multiplier": 1.0, "z_image_modulation": True, "time_scale": 1000.0,
         "pad_tokens_multiple": 32},
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed=("n_heads", "n_kv_heads", "axes_dims", "axes_lens", "rope_theta", "ffn_dim_multiplier",
               "z_image_modulation", "time_scale", "pad_tokens_multiple")),
    "qwen-image": Family(
        "comfy.model_base.QwenImage", "QwenImage",
        dict(image_model="qwen_image", in_channels=64, num_layers=1, num_attention_heads=2, joint_attention_dim=256),
        latent=(1, 16, 1, 8, 8), context=(1, 7, 256), fixed=("num_attention_heads", "joint_attention_dim")),
    "hidream": Family(
        "comfy.model_base.HiDream", "HiDream",
        dict(image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[256, 256],
             max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1], num_attention_heads=2,
             num_routed_experts=4, num_activated_experts=2, num_layers=1, num_single_layers=1, out_channels=16,
             patch_size=2, text_emb_dim=256),
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"y": (1, 256), "encoder_hidden_states_llama3": (1, 2, 7, 256)},
        fixed=("caption_channels", "llama_layers", "num_attention_heads", "num_layers", "num_single_layers",
               "text_emb_dim")),
    "omnigen2": Family(
        "comfy.model_base.Omnigen2", "Omnigen2",
        dict(image_model="omnigen2", axes_dim_rope=[40, 40, 40], axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None,
             hidden_size=480, in_channels=16, multiple_of=256, norm_eps=1e-5, num_attention_heads=4, num_kv_heads=2,
             num_layers=1, num_refiner_layers=1, out_channels=None, patch_size=2, text_feat_dim=256,
             timestep_scale=1000.0),
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed=("hidden_size", "num_attention_heads", "num_kv_heads", "num_layers", "num_refiner_layers",
               "text_feat_dim")),
    "cosmos-predict2": Family(
        "comfy.model_base.CosmosPredict2", "CosmosT2IPredict2", {**_COSMOS, "image_model": "cosmos_predict2"},
        latent=(1, 16, 1, 8, 8), context=(1, 7, 1024),
        fixed=("num_blocks", "num_heads")),
    "anima": Family(
        "comfy.model_base.Anima", "Anima", {**_COSMOS, "image_model": "anima"},
        latent=(1, 16, 1, 8, 8), context=(1, 7, 1024),
        extra={"t5xxl_ids": torch.arange(7)[None], "t5xxl_weights": torch.ones(1, 7, 1)}, heavy=True,
        fixed=("num_blocks", "num_heads")),
    "cosmos": Family(
        "comfy.model_base.CosmosVideo", "CosmosT2V",
        {**{name: value for name, value in _COSMOS.items() if name not in ("min_fps", "max_fps", "rope_enable_fps_modulation")},
         "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
         "pos_emb_learnable": False, "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
         "extra_per_block_abs_pos_emb_type": "learnable", "rope_h_extrapolation_ratio": 2.0,
         "rope_w_extrapolation_ratio": 2.0, "rope_t_extrapolation_ratio": 2.0, "extra_h_extrapolation_ratio": 2.0,
         "extra_w_extrapolation_ratio": 2.0, "extra_t_extrapolation_ratio": 2.0},
        latent=(1, 16, 1, 8, 8), context=(1, 7, 1024), extra={"fps": None}, fixed=("num_blocks", "num_heads")),
    "kandinsky5": Family(
        "comfy.model_base.Kandinsky5", "Kandinsky5", _KANDINSKY, latent=(1, 16, 1, 8, 8), context=(1, 7, 3584),
        extra={"y": (1, 768), "c_concat": (1, 17, 1, 8, 8)}, fixed=("axes_dims",)),
    "ace-step": Family(
        "comfy.model_base.ACEStep", "ACEStep",
        dict(audio_model="ace", attention_head_dim=128, in_channels=8, inner_dim=256, max_height=16, max_position=1024,
             max_width=32768, mlp_ratio=2.5, num_attention_heads=2, num_layers=1, out_channels=8, patch_size=[16, 1],
             rope_theta=1e6, speaker_embedding_dim=512, text_embedding_dim=256, ssl_encoder_depths=[8, 8],
             ssl_latent_dims=[256, 256], ssl_names=["mert", "m-hubert"], lyric_encoder_vocab_size=64,
             lyric_hidden_size=1024),
        latent=(1, 8, 16, 8), context=(1, 7, 256),
        extra={"lyric_token_idx": torch.arange(9)[None], "speaker_embeds": (1, 512), "lyrics_strength": 1.0},
        heavy=True, fixed=("inner_dim", "max_position", "num_attention_heads", "num_layers", "text_embedding_dim",
               "ssl_latent_dims", "lyric_encoder_vocab_size")),
    "ace-step-1.5": Family(
        "comfy.model_base.ACEStep15", "ACEStep15",
        dict(audio_model="ace1.5", hidden_size=256, intermediate_size=256, num_heads=8, encoder_hidden_size=256,
             encoder_num_heads=8, encoder_intermediate_size=256, num_dit_layers=1, fsq_dim=256),
        latent=(1, 64, 10), context=(1, 7, 1024),
        extra={"lyric_embed": (1, 5, 1024), "refer_audio": (1, 64, 10), "is_covers": False}, fixed=("fsq_dim",)),
    "ernie-image": Family(
        "comfy.model_base.ErnieImage", "ErnieImage",
        dict(image_model="ernie", hidden_size=256, num_attention_heads=2, num_layers=1, ffn_hidden_size=512,
             text_in_dim=512),
        latent=(1, 128, 4, 4), context=(1, 7, 512),
        fixed=("hidden_size", "num_attention_heads", "num_layers", "ffn_hidden_size", "text_in_dim")),
    "krea2": Family(
        "comfy.model_base.Krea2", "Krea2",
        dict(image_model="krea2", features=256, channels=16, patch=2, layers=1, heads=2, kvheads=1, txtlayers=2,
             txtdim=256, txtheads=2, txtkvheads=2),
        latent=(1, 16, 1, 8, 8), context=(1, 7, 512), fixed=("txtheads", "txtkvheads")),
    "boogu": Family(
        "comfy.model_base.Boogu", "Boogu",
        dict(image_model="boogu", hidden_size=480, num_layers=1, num_double_stream_layers=1, num_refiner_layers=1,
             instruction_feat_dim=256, num_attention_heads=4, num_kv_heads=2),
        latent=(1, 16, 8, 8), context=(1, 7, 256), extra={"num_tokens": 7},
        fixed=("num_attention_heads", "num_kv_heads")),
    "lens": Family(
        "comfy.model_base.Lens", "Lens",
        dict(image_model="lens", in_channels=128, out_channels=32, num_layers=1, num_attention_heads=4,
             enc_hidden_dim=256, multi_layer_encoder_feature=True, selected_layer_index=(0, 1)),
        latent=(1, 128, 4, 4), context=(1, 7, 512)),
    "ideogram4": Family(
        "comfy.model_base.Ideogram4", "Ideogram4", dict(image_model="ideogram4", in_channels=128, num_layers=1),
        latent=None, context=None),
    "hunyuan3d-2": Family(
        "comfy.model_base.Hunyuan3Dv2", "Hunyuan3Dv2",
        dict(image_model="hunyuan3d2", in_channels=64, context_in_dim=256, hidden_size=256, mlp_ratio=4.0,
             num_heads=16, depth=1, depth_single_blocks=1, qkv_bias=True, guidance_embed=False),
        latent=(1, 64, 8), context=(1, 7, 256)),
    "cogvideox": Family(
        "comfy.model_base.CogVideoX", "CogVideoX_T2V",
        dict(image_model="cogvideox", num_attention_heads=4, attention_head_dim=64, time_embed_dim=256, num_layers=1,
             in_channels=16, patch_size=2, text_embed_dim=256, use_learned_positional_embeddings=False,
             use_rotary_positional_embeddings=True),
        latent=(1, 16, 2, 8, 8), context=(1, 7, 256)),
}
