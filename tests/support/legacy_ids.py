"""Node ids of other packs as workflows rely on them: inputs in the order of their widgets,
defaults, outputs, methods."""

FIRST_GPU = "cpu"  # the default device of ComfyUI-MultiGPU is the first GPU, and here there is none
NAME = object()  # a file that is picked, or a type: no default that a workflow could rely on
MODEL, CLIP, VAE, CHECKPOINT = ["MODEL"], ["CLIP"], ["VAE"], ["MODEL", "CLIP", "VAE"]

_dtypes = {"dequant_dtype": "default", "patch_dtype": "default", "patch_on_device": False}
_two, _three, _four = ({f"clip_name{number}": NAME for number in range(1, count + 1)}
                       for count in (2, 3, 4))

# Id -> (input -> default, outputs, what scripts call).
GGUF = {
    "UnetLoaderGGUF": ({"unet_name": NAME}, MODEL, "load_unet"),
    "UnetLoaderGGUFAdvanced": ({"unet_name": NAME, **_dtypes}, MODEL, "load_unet"),
    "CLIPLoaderGGUF": ({"clip_name": NAME, "type": NAME}, CLIP, "load_clip"),
    "DualCLIPLoaderGGUF": ({**_two, "type": NAME}, CLIP, "load_clip"),
    "TripleCLIPLoaderGGUF": (_three, CLIP, "load_clip"),
    "QuadrupleCLIPLoaderGGUF": (_four, CLIP, "load_clip"),
}
NF4 = {
    "CheckpointLoaderNF4": ({"ckpt_name": NAME,
                             "bnb_dtype": "default"}, CHECKPOINT, "load_checkpoint"),
    "UNETLoaderNF4": ({"unet_name": NAME, "bnb_dtype": "default"}, MODEL, "load_unet"),
    "SP_CheckpointLoaderBNB": ({"ckpt_name": NAME,
                                "load_dtype": "float8_e4m3fn"}, CHECKPOINT, "load_checkpoint"),
    "SP_UnetLoaderBNB": ({"unet_name": NAME,
                          "load_dtype": "float8_e4m3fn"}, MODEL, "load_checkpoint")
}
CALCUIS = {
    "LoaderGGUF": ({"gguf_name": NAME}, MODEL, "load_model"),
    "LoaderGGUFAdvanced": ({"gguf_name": NAME, **_dtypes}, MODEL, "load_model"),
    "ClipLoaderGGUF": ({"clip_name": NAME, "type": NAME, "device": "default"}, CLIP, "load_clip"),
    "DualClipLoaderGGUF": ({**_two, "type": NAME, "device": "default"}, CLIP, "load_clip"),
    "TripleClipLoaderGGUF": (_three, CLIP, "load_clip"),
    "QuadrupleClipLoaderGGUF": (_four, CLIP, "load_clip"),
    "VaeGGUF": ({"vae_name": NAME}, VAE, "load_vae"),
}
KJ = {
    "GGUFLoaderKJ": ({
        "model_name": NAME, "extra_model_name": "none",
        **_dtypes, "enable_fp16_accumulation": False, "attention_override": "none"
    }, MODEL, "EXECUTE_NORMALIZED")
}


def _slots(count: int, switches: bool = False) -> dict:
    """Inputs for the LoRAs of a stack of nunchaku's packs."""
    slots = {}
    for slot in range(1, count + 1):
        slots |= {f"enabled_{slot}": True} if switches else {}
        slots |= {f"lora_name_{slot}": "None", f"lora_strength_{slot}": 1.0}
    return slots


_lora = {"model": NAME, "lora_name": NAME, "lora_strength": 1.0}
_stack = {"model": NAME, "lora_count": 3, "cpu_offload": "disable", **_slots(10)}
_flux_encoders = {
    "text_encoder1": NAME, "text_encoder2": NAME, "t5_min_length": 512
}
NUNCHAKU = {
    "NunchakuFluxDiTLoader": ({
        "model_path": NAME, "cache_threshold": 0, "attention": "nunchaku-fp16",
        "cpu_offload": "auto", "device_id": 0, "data_type": "bfloat16", "i2f_mode": "enabled"
    }, MODEL, "load_model"),
    "NunchakuQwenImageDiTLoader": ({
        "model_name": NAME, "cpu_offload": "auto", "num_blocks_on_gpu": 1,
        "use_pin_memory": "disable"
    }, MODEL, "load_model"),
    "NunchakuZImageDiTLoader": ({"model_name": NAME}, MODEL, "load_model"),
    "NunchakuTextEncoderLoaderV2": (
        {"model_type": NAME, **_flux_encoders}, CLIP, "load_text_encoder"
    ),
    "NunchakuTextEncoderLoader": ({
        "model_type": NAME, **_flux_encoders, "use_4bit_t5": "disable", "int4_model": "none"
    }, CLIP, "load_text_encoder"),
    "NunchakuFluxLoraLoader": (_lora, MODEL, "load_lora"),
    "NunchakuFluxLoraStack": ({"model": NAME, **_slots(15)}, MODEL, "load_lora_stack"),
    "NunchakuQwenImageLoraLoader": (_lora, MODEL, "load_lora"),
    "NunchakuQwenImageLoraStack": (_stack, MODEL, "load_lora_stack"),
    "NunchakuQwenImageLoraStackV2": (_stack, MODEL, "load_lora_stack"),
    "NunchakuQwenImageLoraStackV3": ({
        "model": NAME, "lora_count": 3, "cpu_offload": "disable", "toggle_all": True,
        **_slots(10, switches=True)
    }, MODEL, "load_lora_stack"),
    "NunchakuZImageTurboLoraStackV4": ({
        "model": NAME, "clip": NAME, "lora_count": 3, "toggle_all": True,
        **_slots(10, switches=True)
    }, ["MODEL", "CLIP"], "load_lora_stack"),
}

# What ComfyUI-MultiGPU wraps, beside the loaders of GGUF files.
_PLAIN = {
    "UNETLoader": ({"unet_name": NAME, "weight_dtype": "default"}, MODEL),
    "CLIPLoader": ({"clip_name": NAME, "type": NAME}, CLIP),
    "DualCLIPLoader": ({**_two, "type": NAME}, CLIP), "TripleCLIPLoader": (_three, CLIP),
    "QuadrupleCLIPLoader": (_four, CLIP), "VAELoader": ({"vae_name": NAME}, VAE),
    "CheckpointLoaderSimple": ({"ckpt_name": NAME}, CHECKPOINT)
}


def _wrapped(node_id: str, family: str, inputs: dict) -> dict:
    """The inputs of ComfyUI-MultiGPU behind those of the loader it wraps."""
    if family == "MultiGPU":
        return {**inputs, "device": FIRST_GPU}
    if family == "DisTorchMultiGPU":
        return {
            **inputs, "device": FIRST_GPU, "virtual_vram_gb": 4.0, "use_other_vram": False,
            "expert_mode_allocations": ""
        }
    clip = "CLIP" in node_id
    return {
        **inputs, "device" if clip else "compute_device": FIRST_GPU, "virtual_vram_gb": 4.0,
        "donor_device": "cpu", "expert_mode_allocations": "", "eject_models": not clip
    }


_FAMILIES = {
    "MultiGPU": {**GGUF, **_PLAIN, "CheckpointLoaderNF4": _PLAIN["CheckpointLoaderSimple"]},
    "DisTorchMultiGPU": GGUF, "DisTorch2MultiGPU": {**GGUF, **_PLAIN}
}
MULTIGPU = {
    f"{node_id}{family}": (_wrapped(node_id, family, inputs), outputs, "override")
    for family, loaders in _FAMILIES.items()
    for node_id, (inputs, outputs, *_) in loaders.items()
} | {
    "CheckpointLoaderAdvancedMultiGPU": (
        {
            "ckpt_name": NAME,
            "unet_device": FIRST_GPU,
            "clip_device": FIRST_GPU,
            "vae_device": FIRST_GPU,
        },
        CHECKPOINT,
        "load_checkpoint",
    ),
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": (
        {
            "ckpt_name": NAME,
            "unet_compute_device": FIRST_GPU,
            "unet_virtual_vram_gb": 4.0,
            "unet_donor_device": "cpu",
            "clip_compute_device": "cpu",
            "clip_virtual_vram_gb": 2.0,
            "clip_donor_device": "cpu",
            "vae_device": FIRST_GPU,
            "unet_expert_mode_allocations": "",
            "clip_expert_mode_allocations": "",
            "high_precision_loras": True,
            "eject_models": True,
        },
        CHECKPOINT,
        "load_checkpoint",
    ),
    "UNetLoaderLP": ({"unet_name": NAME}, MODEL, "load_unet"),
}
assert len(MULTIGPU) == 36

LEGACY = GGUF | NF4 | CALCUIS | KJ | NUNCHAKU | MULTIGPU
INPUTS = {node_id: inputs for node_id, (inputs, *_) in LEGACY.items()}
OUTPUTS = {node_id: outputs for node_id, (_, outputs, _) in LEGACY.items()}
METHODS = {node_id: method for node_id, (*_, method) in LEGACY.items()}
