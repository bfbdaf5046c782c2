"""Who computes a model's layers, and in which dtype.

This pack multiplies by the values that a format defines, on every device. ComfyUI multiplies layers
in its own quantised formats with its kernels, which quantise the input of a layer too. The loaders'
input `compute` chooses. Workflows and prompts from before 0.2.2 have a second one, `host formats`,
for those layers alone, or nothing, and keep their meaning.

ComfyUI computes in float32 on every CPU. A CPU that multiplies bfloat16 natively is two to four
times as fast in it, and models that the host would run in bfloat16 on a GPU lose no more there.
"""
from typing import Any

import comfy.cli_args
import comfy.model_management
import torch
from comfy.controlnet import ControlNet
from comfy.model_patcher import ModelPatcher
from comfy.ops import CastWeightBiasOp
from comfy.quant_ops import QUANT_ALGOS
from comfy.taesd.taesd import TAESD

from ...ops import cpu_features
from ...ops.layers import AUTOMATIC, EXACT, FAST, INT8, cpu_attention
from ...ops.tensor.packed_layout import convert_16bit, is_other_16bit, safe_detach
from ..quantizers.comfy_quant_formats import COMFYUI_FORMATS, ComfyUIFormat

FLOAT32 = "float32"  # of earlier versions: exact, in float32 on every device
COMFYUI = "as ComfyUI computes them"  # of earlier versions, of layers in ComfyUI's formats
FOLLOW_COMPUTE = "by compute"
COMPUTE_CHOICES = (AUTOMATIC, EXACT, FAST, INT8, FLOAT32)  # options of the input `compute`
CHOICES_OF_SIDE_MODELS = COMPUTE_CHOICES[:3]  # of text encoders, ControlNets and the like
# options of the input `host formats` -> who computes layers in ComfyUI's formats
HOST_FORMATS = {AUTOMATIC: AUTOMATIC, "exact, from the file's weights": EXACT,
                COMFYUI: COMFYUI}
HOST_FORMATS_CHOICES = (FOLLOW_COMPUTE, *HOST_FORMATS)
# how a model computes -> who computes layers in ComfyUI's formats, with FOLLOW_COMPUTE
WHO_COMPUTES = {AUTOMATIC: AUTOMATIC, EXACT: EXACT, FAST: AUTOMATIC, FLOAT32: EXACT}

# VAEs whose pictures in bfloat16 have a PSNR of at least 45 dB against float32's, as measured.
BFLOAT16_VAES = (TAESD,)
CONVERTED_SHARE = 0.5  # of the free main memory, that weights may take which a file holds too
# The host's flags that choose a dtype for diffusion models or VAEs, or an attention.
DTYPE_FLAGS = ("force_fp32", "force_fp16", "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet",
               "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet")
VAE_DTYPE_FLAGS = ("force_fp32", "force_fp16", "fp32_vae", "fp16_vae", "bf16_vae")
ATTENTION_FLAGS = ("use_split_cross_attention", "use_quad_cross_attention",
                   "use_pytorch_cross_attention", "use_sage_attention", "use_flash_attention",
                   "force_upcast_attention")


def computing(compute: str, host_formats: str = FOLLOW_COMPUTE) -> tuple[str, str]:
    """Returns how a model computes, and who computes its layers in ComfyUI's own formats.

    Args:
        compute: one of `COMPUTE_CHOICES`.
        host_formats: one of `HOST_FORMATS_CHOICES`.

    Returns:
        A key of `WHO_COMPUTES` and a value of `HOST_FORMATS`; such a pair is returned as it is.
    """
    how = FAST if compute == INT8 else compute
    who = WHO_COMPUTES[how]
    return how, (who if host_formats == FOLLOW_COMPUTE
                 else HOST_FORMATS.get(host_formats, host_formats))


def packed_formats(host_formats: str, device: torch.device) -> frozenset[str]:
    """Returns the names of ComfyUI's formats whose layers this pack computes.

    Args:
        host_formats: AUTOMATIC, EXACT or COMFYUI.
        device: where the layers run.
    """
    if host_formats == COMFYUI:
        return frozenset()
    return frozenset(name for name in COMFYUI_FORMATS
                     if host_formats == EXACT or not host_multiplies(name, device))


def encoder_formats(host_formats: str, device: torch.device) -> frozenset[str]:
    """Returns `packed_formats` for text encoders, and for the VAE of a checkpoint.

    Of some the host has no layers for its formats and takes codes for values; of all others its
    layers dequantise, so that this pack's are as fast.
    """
    return packed_formats(host_formats if host_formats == COMFYUI else EXACT, device)


def host_multiplies(name: str, device: torch.device) -> bool:
    """Returns whether ComfyUI has a product for a format on a device."""
    known = COMFYUI_FORMATS.get(name, ComfyUIFormat)  # which has the default of newer ones
    return (
        name in QUANT_ALGOS
        and device.type == "cuda"
        and torch.version.cuda is not None  # not AMD's
        and torch.cuda.get_device_capability(device) >= known.capability
    )


def choose_compute(patcher: ModelPatcher, compute: str):
    """Makes a diffusion model compute in the dtype, and with the attention, that fit its device.

    The host's flags go first.

    Args:
        patcher: the model's; model and patcher are changed in place.
        compute: a key of `WHO_COMPUTES`.
    """
    dtype = compute_dtype(patcher, compute)
    if dtype is not None:
        patcher.model.manual_cast_dtype = dtype
        patcher.model.rounds_f16 = _convert_16bit_weights(patcher.model.diffusion_model, dtype)
    on_a_cpu = comfy.model_management.is_device_cpu(patcher.load_device)
    if on_a_cpu and not _has_flag(ATTENTION_FLAGS):
        transformer_options = patcher.model_options["transformer_options"]
        transformer_options.setdefault("optimized_attention_override", cpu_attention.attention)


def _convert_16bit_weights(network: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Converts 16-bit weights of another dtype once, to the values that each step would round them
    to; where main memory is short they stay mapped from their file.

    Returns:
        Whether F16 weights lose digits by that.
    """
    found = [(module, name, weight) for module in network.modules()
             for name, weight in module._parameters.items()
             if weight is not None and is_other_16bit(weight, dtype)]
    free: Any = comfy.model_management.get_free_memory(torch.device("cpu"))
    is_rounded = bool(found) and dtype == torch.bfloat16
    if sum(weight.nbytes for *_, weight in found) > CONVERTED_SHARE * free:
        return is_rounded
    for module, name, weight in found:
        module._parameters[name] = torch.nn.Parameter(
            convert_16bit(safe_detach(weight), dtype), requires_grad=False)
    return is_rounded


def compute_dtype(patcher: ModelPatcher, compute: str) -> torch.dtype | None:
    """Returns the dtype that a diffusion model is to compute in; None: the host's choice.

    Args:
        patcher: the model's.
        compute: a key of `WHO_COMPUTES`.
    """
    if _has_flag(DTYPE_FLAGS):
        return None
    if compute == FLOAT32:
        return torch.float32
    if (
        comfy.model_management.is_device_cpu(patcher.load_device)
        and cpu_features.multiplies_bfloat16()
        and patcher.model.get_dtype_inference() == torch.float32
        and torch.bfloat16 in patcher.model.model_config.supported_inference_dtypes
    ):
        return torch.bfloat16
    return None


def guided_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Returns what a model on a device, and with it one that guides it, may compute in besides
    float32."""
    if comfy.model_management.is_device_cpu(device):
        return (torch.bfloat16,) if cpu_features.multiplies_bfloat16() else ()
    return torch.float16, torch.bfloat16


def follows_model(control_net: ControlNet) -> bool:
    """Returns whether a ControlNet is to compute in the dtype of the model that it guides.

    That is so on a CPU, unless the host has chosen a dtype for it, or it has layers that compute in
    the dtype of their weights only.
    """
    model: Any = control_net.control_model
    return (
        comfy.model_management.is_device_cpu(control_net.load_device)
        and model.dtype == torch.float32
        and all(isinstance(layer, CastWeightBiasOp) for layer in model.modules()
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)))
    )


def vae_dtype(model: torch.nn.Module, device: torch.device, compute: str) -> torch.dtype | None:
    """Returns the dtype that a VAE is to compute in; None: the host's choice.

    Args:
        model: what encodes and decodes in the host's VAE.
        device: where it runs.
        compute: a key of `WHO_COMPUTES`.
    """
    if (
        compute != FLOAT32
        and not _has_flag(VAE_DTYPE_FLAGS)
        and comfy.model_management.is_device_cpu(device)
        and cpu_features.multiplies_bfloat16()
        and isinstance(model, BFLOAT16_VAES)
    ):
        return torch.bfloat16
    return None


def _has_flag(names: tuple[str, ...]) -> bool:
    """Returns whether ComfyUI was started with one of these flags."""
    return any(getattr(comfy.cli_args.args, name, False) for name in names)
