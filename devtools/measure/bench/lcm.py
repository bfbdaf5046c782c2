"""The case of a picture in four steps on a CPU, as FastSD CPU draws it."""
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from devtools.measure.bench import cpu
from devtools.measure.bench.timing import device, median_and_range

import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes
from devtools.files.gguf_files import write_random_gguf
from devtools.files.tiny_models import clip_l_shapes
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.loaders.models.vae import wrap_vae

STEPS = 4
PROMPT = "a white feather resting on a brass balance scale, soft morning light"
TEXT, SAMPLING, VAES = "text encoder", f"{STEPS} steps", ("VAE", "TAESD")
VAE_CHANNELS = 128  # which the host takes for granted


def bench_lcm(options):
    """From a prompt to a picture of 512 by 512 on a CPU: the text encoder, four steps of Stable
    Diffusion 1.5 with LCM's LoRA, and a VAE or a small one (TAESD). Text encoder and model are in
    Q8_0, and ComfyUI's nodes run them as in the example workflow; OpenVINO runs the same parts
    with 16-bit weights that hold the LoRA, where openvino and diffusers are installed."""
    if device().type != "cpu":
        print("  the device is no CPU")
        return
    channels, size = options.sizes.unet
    ways = {"this pack": pack_parts(channels, size)}
    if cpu.has_openvino():
        precision = cpu.fitting_precision()
        parts = openvino_parts(channels, size, precision)
        ways = {f"OpenVINO {cpu.PRECISIONS[precision]}": parts, **ways}
    seconds = {name: {part: [] for part in parts} for name, parts in ways.items()}
    for round_number in range(options.rounds + 1):  # the first warms up
        for name, parts in ways.items():
            for part, run in parts.items():
                started = time.perf_counter()
                run()
                if round_number:
                    seconds[name][part].append(time.perf_counter() - started)
    for part in (TEXT, SAMPLING, *VAES):
        yield part, {name: median_and_range(times[part]) for name, times in seconds.items()}
    for vae in VAES:
        yield f"prompt to picture, {vae}", {
            name: median_and_range([sum(parts) for parts in zip(*map(times.get, (
                TEXT, SAMPLING, vae)))]) for name, times in seconds.items()}


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
    model = cpu.with_lora(cpu.packed_unet(channels, "Q8_0", "exact"))
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

    vaes = (AutoencoderKL(ddconfig={**cpu.VAE, "ch": VAE_CHANNELS}, embed_dim=4),
            TAESD(latent_channels=4))
    return {TEXT: encode, SAMPLING: sample, **{
        name: functools.partial(decode, wrap_vae(comfy.sd.VAE(
            cpu.with_random_values(model).half().state_dict())))
        for name, model in zip(VAES, vaes)}}


def openvino_parts(channels: int, size: int, precision: str) -> dict[str, Callable[[], None]]:
    """The same parts in OpenVINO; the arguments are those of `pack_parts` and of
    `openvino_steps`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    inputs = cpu.step_inputs(size)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    encode, = cpu.compiled_by_openvino(
        text_encoder, {"input_ids": torch.zeros(1, cpu.TEXT_TOKENS, dtype=torch.int64)},
        [precision]).values()
    step, = cpu.openvino_steps(channels, inputs, [precision]).values()

    def sample():
        for _ in range(STEPS):
            step()

    parts = {TEXT: encode, SAMPLING: sample}
    for name in VAES:
        parts[name], = cpu.openvino_decoders(name, VAE_CHANNELS, inputs[0], [precision]).values()
    return parts
