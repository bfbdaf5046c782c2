"""The case of a step of Stable Diffusion 1.5 on a CPU, compared with OpenVINO's."""
import contextlib
import importlib.util
from unittest import mock

from devtools.measure.bench.timing import device, side_by_side
from devtools.measure.weights import random_weight

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

from featherweight.loaders.compute_choice import choose_compute, compute_text
from featherweight.ops.format import FORMATS
from featherweight.ops.operations import packed_operations
from featherweight.ops.patcher import adopt

EXTRAS = ("openvino", "diffusers")  # the group "bench" of pyproject.toml
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


def bench_cpu(options):
    """A step of Stable Diffusion 1.5 on a CPU, one picture of 512 by 512: packed linear layers and
    convolutions in F16, in what the CPU computes in by default, in float32 as on a CPU without
    bfloat16, and in float32 as version 0.2.0; and OpenVINO's with 16-bit weights, in bfloat16 and
    in float32, where openvino and diffusers are installed."""
    if device().type != "cpu":
        print("  the device is no CPU")
        return
    channels, size = options.sizes.unet
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(1, 4, size, size, generator=generator), torch.tensor([5.0]),
              torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator))
    others = {}
    if all(map(importlib.util.find_spec, EXTRAS)):
        others = openvino_steps(channels, inputs)
    else:
        print(f"  OpenVINO is not measured: pip install {' '.join(EXTRAS)}")
    for format_name in options.formats:
        variants = dict(others)
        for compute, flag in (("exact", False), ("exact", True), ("float32", False)):
            with mock.patch.object(comfy.cli_args.args, "fp32_unet", flag):
                model = packed_unet(channels, format_name, compute)
            variants[f"{compute}, {compute_text(model)}"] = step_of(model, inputs)
        yield format_name, side_by_side(variants, options.rounds)


def packed_unet(channels: int, format_name: str, compute: str):
    """A U-Net of random weights; channels: 320 in Stable Diffusion 1.5, a multiple of 32."""
    config = comfy.supported_models.SD15({**UNET, "model_channels": channels})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = packed_operations(compute=compute)
    model = config.get_model({}, "", device=None)
    weights = {name: random_values(tuple(parameter.shape), format_name)
               for name, parameter in model.diffusion_model.state_dict().items()}
    model.load_model_weights(weights, "")
    cpu = torch.device("cpu")
    patcher = adopt(comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu))
    choose_compute(patcher, compute)
    return patcher


def random_values(shape: tuple[int, ...], format_name: str):
    """Zeros for a bias or a norm, packed values for a matrix, F16 for a convolution."""
    if len(shape) == 1:
        return torch.zeros(shape)
    block_length = FORMATS[format_name].block_length
    if len(shape) == 2 and shape[1] % block_length == 0:
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


def openvino_steps(channels: int, inputs) -> dict:
    """The same U-Net of diffusers in OpenVINO, on as many threads as torch has."""
    import openvino
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=inputs[0].shape[-1], cross_attention_dim=CONTEXT, attention_head_dim=HEADS,
        block_out_channels=tuple(channels * factor for factor in UNET["channel_mult"]))
    names = "sample", "timestep", "encoder_hidden_states"
    with torch.no_grad(), contextlib.redirect_stdout(None):
        model = openvino.convert_model(unet.eval().half().float(),
                                       example_input=dict(zip(names, inputs)))
    model.reshape({number: list(value.shape) for number, value in enumerate(inputs)})
    core, steps = openvino.Core(), {}
    arrays = dict(enumerate(value.numpy() for value in inputs))
    for name, precision in (("OpenVINO bfloat16", "bf16"), ("OpenVINO float32", "f32")):
        compiled = core.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads()})
        steps[name] = lambda compiled=compiled: compiled(arrays)
    return steps
