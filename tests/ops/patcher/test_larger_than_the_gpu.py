"""Models and text encoders larger than the GPU, with two LoRAs: the bits of the CPU, on a device
that never holds more than it may, with a budget and without.

The heavy ones are of 3 GiB on a GPU of 1 GiB, and each takes minutes.
"""
import functools
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import pytest
import torch
from gpu_memory import empty_gpus
from lora_models import pairs
from patched_models import patched
from small_encoders import encode, patched_clip

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.placement import place, place_clip
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.ops.layers import workspace
from featherweight.ops.patcher.residency import PAGE

GIB, MIB = 1 << 30, 1 << 20
BOTH = [pytest.param(False, marks=pytest.mark.fake_gpus, id="static"),
        pytest.param(True, marks=pytest.mark.fake_gpus(dynamic=True), id="dynamic")]
# of a layer that is dequantised at a time, on the CPU too: other slices give other last bits
SLICE = MIB
COMPUTING = 32 * MIB  # bytes that a step takes beside weights and the buffers they travel through
INPUTS = 100_000  # bytes that a step sends beside weights
BY_LOADING = 100_000  # and what loading a second time does
CPU = {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}


class Subject(NamedTuple):
    """load: options of the host -> a model or text encoder with its LoRAs. run: it -> its output.
    place: see `place`."""
    load: Callable[[dict], Any]
    run: Callable[[Any], torch.Tensor]
    place: Callable[[Any, float], Any]


@pytest.fixture
def gpu(one_thread, monkeypatch):
    monkeypatch.setattr(workspace, "DEVICE_WORKSPACE_BYTES", SLICE)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", SLICE)
    with empty_gpus(GIB) as counters:
        yield counters
    # which are as large as the largest layer that travelled
    comfy.model_management.reset_cast_buffers()


def loras(prefix: str, layers: dict[str, tuple]) -> list[tuple[dict, float]]:
    """Two LoRAs for all layers, and their strengths."""
    named = {prefix + name: shape for name, shape in layers.items()}
    return [(pairs(named, rank=4), 0.7), (pairs(named, rank=3), -0.4)]


# --- diffusion models ---


def flux(path, sizes: dict) -> Subject:
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in tiny_models.flux_shapes(**sizes).items() if len(shape) > 1
    }

    def load(options: dict):
        return patched(load_diffusion_model(str(path), model_options=options),
                       *loras("diffusion_model.", layers))

    return Subject(load, functools.partial(flux_step, context=sizes.get("context", 1024)), place)


def flux_step(patcher, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    comfy.model_management.load_models_gpu([patcher])
    with torch.no_grad():
        return patcher.model.apply_model(
            x=torch.randn(1, 16, 8, 8, generator=generator).to(patcher.load_device),
            t=torch.tensor([0.5], device=patcher.load_device),
            c_crossattn=torch.randn(1, 5, context,
                                    generator=generator).to(patcher.load_device)).float().cpu()


def write_flux(path, format_name: str, sizes: dict):
    if format_name == "NF4":
        pytest.importorskip("bitsandbytes", reason="it writes the file")
        from devtools.files.bnb_files import write_random_bnb

        write_random_bnb(path, tiny_models.flux_shapes(**sizes))
    else:
        write_random_gguf(path, tiny_models.flux_shapes(**sizes), format_name)


# --- text encoders ---


def t5_shapes(layers: int, width: int, inner: int, heads: int, tokens: int) -> dict[str, tuple]:
    """Shapes of a T5, in the names of transformers, and of the tensor by which the host knows the
    T5-XXL."""
    shapes = {"shared.weight": (tokens, width), "encoder.final_layer_norm.weight": (width,),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, heads)}
    for layer in map("encoder.block.{}.layer".format, range(layers)):
        shapes |= {f"{layer}.{part}.layer_norm.weight": (width,) for part in (0, 1)}
        shapes |= {f"{layer}.0.SelfAttention.{part}.weight": (64 * heads, width) for part in "qkv"}
        shapes |= {f"{layer}.0.SelfAttention.o.weight": (width, 64 * heads)}
        shapes |= {
            f"{layer}.1.DenseReluDense.{part}.weight": (inner, width) for part in ("wi_0", "wi_1")
        }
        shapes |= {f"{layer}.1.DenseReluDense.wo.weight": (width, inner)}
    return {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 32)} | shapes


def t5(path, shapes: dict[str, tuple], sizes: dict) -> Subject:
    config = {
        "num_layers": sizes["layers"], "vocab_size": sizes["tokens"], "d_model": sizes["width"],
        "d_ff": sizes["inner"], "d_kv": 64, "num_heads": sizes["heads"]
    }
    layers = {
        name.removesuffix(".weight"): shape for name, shape in shapes.items()
        if len(shape) > 1 and shape[1] > 32
    }

    def load(options: dict):
        options = {
            **options, "dtype": torch.float32, "t5xxl_model_config": config, "model_config": config
        }
        return patched_clip(load_text_encoder([str(path)], "sd3", model_options=options), *loras(
            "text_encoders.t5xxl.transformer.", layers))

    return Subject(load, encode, place_clip)


# --- what holds ---


def check(subject: Subject, pages: int, inference: float, gpu, monkeypatch):
    """pages: of weights that stay where there is a budget. inference: bytes that the host then
    keeps free for computing."""
    expected = subject.run(subject.load(CPU))
    assert expected.isfinite().all()
    comfy.model_management.unload_all_models()
    gc.collect()
    before = gpu.used()  # what earlier tests of this process left: workspaces, tables

    whole = subject.load({})
    gpu.reset()
    # as ComfyUI is, which keeps more free for computing than there is
    assert torch.equal(subject.run(whole), expected)
    tell("no budget", gpu)

    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: inference)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 1)
    patcher = getattr(whole, "patcher", whole)
    model = patcher.model
    beside = (
        model.model_loaded_weight_memory if patcher.is_dynamic() else model.packed_patches.nbytes
    )
    placed = subject.place(whole, pages * PAGE + beside)
    patcher = getattr(placed, "patcher", placed)
    if patcher.is_dynamic():
        assert torch.equal(subject.run(placed), expected)  # the first run brings in what then stays
    comfy.model_management.load_models_gpu([patcher])
    gpu.reset()
    comfy.model_management.load_models_gpu([patcher])
    loading = gpu.copied().up
    assert torch.equal(subject.run(placed), expected)
    copied = gpu.copied().up - 2 * loading  # a run loads, too
    tell(f"{patcher.placement.gpu_bytes / 1e6:.1f} of {patcher.full_size() / 1e6:.1f} MB", gpu)
    assert loading < BY_LOADING
    assert copied <= patcher.full_size() - pages * PAGE + largest(patcher) + INPUTS
    assert gpu.peak() <= before + patcher.placement.gpu_bytes + buffers(patcher) + COMPUTING


def largest(patcher) -> int:
    return max(size for *_, size, _, _, _ in patcher._load_list())


def buffers(patcher) -> int:
    """What layers travel through: one buffer for each stream, in dynamic VRAM of whole pages."""
    streams = comfy.model_management.NUM_STREAMS
    return (
        (streams + 1) * -(-largest(patcher) // PAGE) * PAGE
        if patcher.is_dynamic()
        else streams * largest(patcher)
    )


def tell(what: str, gpu):
    """For whoever runs it with `-s`."""
    print(f"{what}: peak {gpu.peak() / 1e6:.1f} MB, copied {gpu.copied().up / 1e6:.1f} MB")


@pytest.mark.parametrize("is_dynamic", BOTH)
def test_a_text_encoder_runs_on_a_gpu_that_is_smaller(is_dynamic, gpu, monkeypatch, tmp_path):
    sizes = {"layers": 22, "width": 512, "inner": 2048, "heads": 8, "tokens": 2560}
    shapes = t5_shapes(**sizes)
    write_random_gguf(tmp_path / "t5.gguf", shapes, "Q8_0", None)
    gpu.set_capacity(gpu.used() + 90 * MIB)
    pages = 0 if is_dynamic else 1  # comfy-aimdo keeps more free than this device has
    check(t5(tmp_path / "t5.gguf", shapes, sizes), pages, 40 * MIB, gpu, monkeypatch)


@pytest.mark.heavy
@pytest.mark.parametrize(("format_name", "sizes"), [
    ("Q8_0", {"hidden": 3072, "double_blocks": 5, "single_blocks": 10}),
    ("NF4", {"hidden": 3072, "double_blocks": 9, "single_blocks": 19})])
@pytest.mark.parametrize("is_dynamic", BOTH)
def test_a_model_of_3_gib_runs_on_a_gpu_of_1(format_name, sizes, is_dynamic, gpu, monkeypatch,
                                             tmp_path):
    path = tmp_path / "flux.safetensors" if format_name == "NF4" else tmp_path / "flux.gguf"
    write_flux(path, format_name, sizes)
    check(flux(path, sizes), 8, 500 * MIB, gpu, monkeypatch)


@pytest.mark.heavy
@pytest.mark.parametrize("is_dynamic", BOTH)
def test_a_text_encoder_of_3_gib_runs_on_a_gpu_of_1(is_dynamic, gpu, monkeypatch, tmp_path):
    sizes = {"layers": 16, "width": 4096, "inner": 10240, "heads": 64, "tokens": 32128}
    shapes = t5_shapes(**sizes)
    write_random_gguf(tmp_path / "t5.gguf", shapes, "Q8_0", None)
    check(t5(tmp_path / "t5.gguf", shapes, sizes), 8, 500 * MIB, gpu, monkeypatch)
