"""Cases of Stable Diffusion 1.5 on a CPU, compared with OpenVINO's: a step and the VAE, and a
picture in four steps as FastSD CPU draws it."""
import contextlib
import copy
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

from devtools.measure.in_turn import time_in_turn
from devtools.measure.timing import as_in_use, has_bfloat16, median_and_range, side_by_side
from devtools.measure.weights import random_weight, takes_shape

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.weight_adapter
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes
from devtools import ROOT, limited_cpu
from devtools.files.gguf_files import write_random_gguf
from devtools.files.tiny_models import clip_l_shapes
from featherweight.loaders.comfyui.compute import choose_compute, vae_dtype
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.loaders.models.vae import wrap_vae
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.kernels.kernel import dtype_name
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.layers.cpu_convolution import convolve_dense_layers
from featherweight.ops.layers.load_hooks import pack_layers
from featherweight.ops.layers.product import values_of
from featherweight.ops.packing.pack_tensor import pack_tensor
from featherweight.ops.patcher import adopt
from featherweight.ops.tensor.packed_tensor import relabel

EXTRAS = ("openvino", "diffusers")  # the group "bench" of pyproject.toml
PRECISIONS = {"bf16": "bfloat16", "f32": "float32"}  # as OpenVINO names them
CONTEXT = 768  # width of the text conditioning
TEXT_TOKENS = 77
HEADS = 8
UNET = {
    "image_size": 32, "use_checkpoint": False, "legacy": False, "in_channels": 4, "out_channels": 4,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": HEADS,
    "num_head_channels": -1, "adm_in_channels": None, "use_temporal_attention": False,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "context_dim": CONTEXT,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3
}
LORA_RANK = 64  # of LCM's LoRA, which changes the convolutions too
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0
}
STEPS = 4
PROMPT = "a white feather resting on a brass balance scale, soft morning light"
TEXT, SAMPLING, VAES = "text encoder", f"{STEPS} steps", ("VAE", "TAESD")
VAE_CHANNELS = 128  # which the host takes for granted


def bench_cpu(options):
    """A step of Stable Diffusion 1.5 on a CPU, one picture of 512 by 512: packed linear layers and
    convolutions in F16, in what the CPU computes in by default, the same with a LoRA as LCM's, in
    float32 as on a CPU without bfloat16, and in float32 as version 0.2.0; its VAE and a small one
    (TAESD) by ComfyUI and as this pack loads them, dense and in Q8_0; and OpenVINO's with 16-bit
    weights, in bfloat16 and in float32, where openvino and diffusers are installed. A step on one
    thread of the same CPU with fewer instruction sets, also dense in ComfyUI."""
    channels, inputs = options.sizes.unet[0], step_inputs(options.sizes.unet[1])
    if not has_openvino():
        print(f"  OpenVINO is not measured: pip install {' '.join(EXTRAS)}")
    others = openvino_steps(channels, inputs) if has_openvino() else {}
    for format_name in options.formats:
        variants = dict(others)
        for compute, flag in (("exact", False), ("exact", True), ("float32", False)):
            with mock.patch.object(comfy.cli_args.args, "fp32_unet", flag):
                model = packed_unet(channels, format_name, compute)
            variants[f"{compute}, {dtype_text(model)}"] = step_of(model, inputs)
        yield format_name, side_by_side(variants, options.rounds)
    plain, changed = (packed_unet(channels, options.formats[0], "exact") for _ in range(2))
    variants = {"no LoRA": step_of(plain, inputs), "LCM's": step_of(with_lora(changed), inputs)}
    yield f"{options.formats[0]}, LoRA", side_by_side(variants, options.rounds)
    latent, vae_channels = inputs[0], max(32, channels * 2 // 5)
    config = {**VAE, "ch": vae_channels}
    for name, make in (("VAE", lambda: AutoencoderKL(ddconfig=config, embed_dim=4)),
                       ("TAESD", lambda: TAESD(latent_channels=4))):
        vae = with_random_values(make())
        variants = openvino_decoders(name, vae_channels, latent) if others else {}
        variants["ComfyUI"] = decode_of(vae, latent)
        dtype = vae_dtype(vae, latent.device, "exact") or latent.dtype
        vae = copy.deepcopy(vae).to(dtype)
        with pack_layers():
            packed = make()
        packed.load_state_dict(
            {key: packed_kernel(weight) for key, weight in vae.state_dict().items()})
        convolve_dense_layers(vae)
        for title, model in (("this pack", vae), ("Q8_0", packed.eval().to(dtype))):
            variants[f"{title}, {dtype_name(dtype)}"] = decode_of(model, latent.to(dtype))
        yield name, side_by_side(variants, options.rounds)
    for limit in limited_cpu.LIMITS:
        if reason := limited_cpu.why_not(limit):
            print(f"  {limit} is not measured: {reason}")
        else:
            yield f"{options.formats[0]}, CPU limited to {limit}", limited_steps(limit, options)


def limited_steps(limit: str, options) -> dict[str, dict]:
    """What `time_steps` gives in a process with one thread on a limited CPU."""
    with limited_cpu.environment(limit) as variables:
        process = subprocess.run(
            [sys.executable, "-m", __name__, options.formats[0],
             *map(str, (options.rounds, *options.sizes.unet))],
            cwd=ROOT, env={**variables, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
            check=True)
    return json.loads(process.stdout.splitlines()[-1])


def time_steps(format_name: str, rounds: int, channels: int, size: int) -> dict[str, dict]:
    """Times a step of the packed model and, in the dtype that it computes in, of OpenVINO's, and
    one of the dense model in float32 as ComfyUI runs it."""
    inputs = step_inputs(size)
    variants = {}
    if has_openvino():
        variants = openvino_steps(channels, inputs, [fitting_precision()])
    packed = packed_unet(channels, format_name, "exact")
    variants[f"exact, {dtype_text(packed)}"] = step_of(packed, inputs)
    variants["dense in ComfyUI, float32"] = step_of(dense_unet(channels), inputs)
    return side_by_side(variants, rounds)


def dtype_text(patcher) -> str:
    """What a model computes in, as the tables of the docs have it."""
    return f"computes in {dtype_name(patcher.model.get_dtype_inference())}"


def has_openvino() -> bool:
    return all(map(importlib.util.find_spec, EXTRAS))


def fitting_precision() -> str:
    """What this pack computes in by default, of `PRECISIONS`."""
    return "bf16" if has_bfloat16() else "f32"


def step_inputs(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent, time step and text of a step; size: the latent's side."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1, 4, size, size, generator=generator), torch.tensor([5.0]),
            torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator))


def with_random_values(model: torch.nn.Module) -> torch.nn.Module:
    """Fills a model of the host's, whose layers leave their values open."""
    for parameter in model.requires_grad_(False).eval().parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.constant_(parameter, 0.5)
    return model


def packed_kernel(weight: torch.Tensor) -> torch.Tensor:
    """A weight in Q8_0, or as it is where blocks of 32 values do not divide its rows."""
    if weight.ndim < 2 or weight[0].numel() % FORMATS["Q8_0"].block_length:
        return weight
    packed = pack_tensor(weight.float().flatten(1), FORMATS["Q8_0"])
    return relabel(packed, shape=weight.shape)


def decode_of(vae, latent):
    def run():
        with torch.inference_mode():
            vae.decode(latent)

    return run


def with_lora(patcher):
    """The U-Net with a LoRA on each of its matrices and convolutions."""
    patches = {}
    for name, weight in patcher.model.diffusion_model.state_dict().items():
        if weight.ndim > 1 and "blocks" in name:
            taps = (1,) * (weight.ndim - 2)
            up = torch.randn(weight.shape[0], LORA_RANK, *taps) / 1000
            down = torch.randn(LORA_RANK, *weight.shape[1:]) / 100
            patches[f"diffusion_model.{name}"] = comfy.weight_adapter.LoRAAdapter(
                set(), (up, down, float(LORA_RANK), None, None, None))
    patcher = patcher.clone()
    patcher.add_patches(patches)
    return patcher


def packed_unet(channels: int, format_name: str, compute: str):
    """A U-Net of random weights; channels: 320 in Stable Diffusion 1.5, a multiple of 32."""
    patcher = adopt(unet(channels, lambda shape: random_values(shape, format_name),
                         packed_operations(compute=compute)))
    choose_compute(patcher, compute)
    return patcher


def dense_unet(channels: int):
    """The same in float32, as ComfyUI loads it."""
    return unet(channels, lambda shape: values_of(random_values(shape, "Q8_0")).float())


def unet(channels: int, values: Callable[[tuple[int, ...]], torch.Tensor], operations=None):
    config = comfy.supported_models.SD15({**UNET, "model_channels": channels})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    model = config.get_model({}, "", device=None)
    weights = {name: values(tuple(parameter.shape))
               for name, parameter in model.diffusion_model.state_dict().items()}
    model.load_model_weights(weights, "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def random_values(shape: tuple[int, ...], format_name: str):
    """Ones for a bias or a norm, packed values for a matrix, F16 for a convolution."""
    if len(shape) == 1:
        return torch.ones(shape)
    if takes_shape(format_name, shape):
        return random_weight(format_name, shape)
    return (torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5).half()


def step_of(patcher, inputs):
    """A function that runs one step with the attention that sampling would use."""
    latent, time_step, text = inputs

    def run():
        options = dict(patcher.model_options["transformer_options"])
        with torch.inference_mode():
            patcher.model.apply_model(latent, time_step, c_crossattn=text,
                                      transformer_options=options)

    run.prepare = lambda: comfy.model_management.load_models_gpu([patcher])
    return run


def openvino_steps(channels: int, inputs, precisions: Iterable[str] = PRECISIONS) -> dict:
    """The same U-Net of diffusers in OpenVINO."""
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    unet = UNet2DConditionModel(
        sample_size=inputs[0].shape[-1], cross_attention_dim=CONTEXT, attention_head_dim=HEADS,
        block_out_channels=tuple(channels * factor for factor in UNET["channel_mult"]))
    return compiled_by_openvino(unet, dict(zip(
        ("sample", "timestep", "encoder_hidden_states"), inputs)), precisions)


def openvino_decoders(name: str, channels: int, latent: torch.Tensor,
                      precisions: Iterable[str] = PRECISIONS) -> dict:
    """The decoder of diffusers' VAE of that name in OpenVINO; channels: of the VAE, 128."""
    from diffusers import AutoencoderKL, AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]

    vae = AutoencoderTiny() if name == "TAESD" else AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * 4, down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=tuple(channels * factor for factor in VAE["ch_mult"]),
        layers_per_block=VAE["num_res_blocks"])
    vae.forward = lambda sample: vae.decode(sample, return_dict=False)[0]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return compiled_by_openvino(vae, {"sample": latent}, precisions)


def compiled_by_openvino(model: torch.nn.Module, inputs: dict[str, torch.Tensor],
                         precisions: Iterable[str] = PRECISIONS) -> dict:
    """A model of diffusers with 16-bit weights in OpenVINO, on as many threads as torch has.

    Args:
        inputs: by the names of the arguments of `model`.
        precisions: that it computes in, of `PRECISIONS`.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    with torch.no_grad(), contextlib.redirect_stdout(None):
        converted = openvino.convert_model(model.eval().half().float(), example_input=inputs)
    converted.reshape({number: list(value.shape) for number, value in enumerate(inputs.values())})
    core, steps = openvino.Core(), {}
    arrays = dict(enumerate(value.numpy() for value in inputs.values()))
    for precision in precisions:
        compiled = core.compile_model(converted, "CPU", {
            "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        steps[f"OpenVINO {PRECISIONS[precision]}"] = lambda compiled=compiled: compiled(arrays)
    return steps


def bench_lcm(options):
    """From a prompt to a picture of 512 by 512 on a CPU: the text encoder, four steps of Stable
    Diffusion 1.5 with LCM's LoRA, and a VAE or a small one (TAESD). Text encoder and model are in
    Q8_0, and ComfyUI's nodes run them as in the example workflow; OpenVINO runs the same parts
    with 16-bit weights that hold the LoRA, where openvino and diffusers are installed."""
    channels, size = options.sizes.unet
    ways = {"this pack": pack_parts(channels, size)}
    if has_openvino():
        precision = fitting_precision()
        parts = openvino_parts(channels, size, precision)
        ways = {f"OpenVINO {PRECISIONS[precision]}": parts, **ways}
    variants = {f"{name}, {part}": run
                for name, parts in ways.items() for part, run in parts.items()}
    time_in_turn(variants, 1)  # to warm up
    seconds = time_in_turn(variants, options.rounds)
    for part in (TEXT, SAMPLING, *VAES):
        yield part, {name: median_and_range(seconds[f"{name}, {part}"]) for name in ways}
    for vae in VAES:
        yield f"prompt to picture, {vae}", {
            name: median_and_range([sum(parts) for parts in zip(
                *(seconds[f"{name}, {part}"] for part in (TEXT, SAMPLING, vae)))]) for name in ways}


def pack_parts(channels: int, size: int) -> dict[str, Callable[[], None]]:
    """What draws a picture with this pack's models and ComfyUI's nodes, in the order to run it.

    Args:
        channels: of the U-Net.
        size: the latent's side.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip_l-Q8_0.gguf")
        write_random_gguf(path, clip_l_shapes(), "Q8_0", None)
        clip = load_text_encoder([str(path)], "stable_diffusion")
    model = with_lora(packed_unet(channels, "Q8_0", "exact"))
    model, = ModelSamplingDiscrete().patch(model, "lcm", False)
    state = {}

    def encode():
        state["text"], = nodes.CLIPTextEncode().encode(clip, PROMPT)

    def sample():
        empty = {"samples": torch.zeros(1, 4, size, size)}
        state["latent"], = nodes.common_ksampler(model, 0, STEPS, 1.0, "lcm", "sgm_uniform",
                                                 state["text"], state["text"], empty)

    def decode(vae):
        nodes.VAEDecode().decode(vae, state["latent"])

    vaes = (AutoencoderKL(ddconfig={**VAE, "ch": VAE_CHANNELS}, embed_dim=4),
            TAESD(latent_channels=4))
    return {TEXT: encode, SAMPLING: sample, **{
        name: functools.partial(decode, wrap_vae(comfy.sd.VAE(
            with_random_values(model).half().state_dict())))
        for name, model in zip(VAES, vaes)}}


def openvino_parts(channels: int, size: int, precision: str) -> dict[str, Callable[[], None]]:
    """The same parts in OpenVINO; the arguments are those of `pack_parts` and of
    `openvino_steps`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    inputs = step_inputs(size)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    encode, = compiled_by_openvino(
        text_encoder, {"input_ids": torch.zeros(1, TEXT_TOKENS, dtype=torch.int64)},
        [precision]).values()
    step, = openvino_steps(channels, inputs, [precision]).values()

    def sample():
        for _ in range(STEPS):
            step()

    parts = {TEXT: encode, SAMPLING: sample}
    for name in VAES:
        parts[name], = openvino_decoders(name, VAE_CHANNELS, inputs[0], [precision]).values()
    return parts


if __name__ == "__main__":
    with as_in_use():
        print(json.dumps(time_steps(sys.argv[1], *map(int, sys.argv[2:]))))
