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
from gpu_memory import BOTH, empty_gpus, largest_layer
from lora_models import pairs
from pack_api import load_diffusion_model
from patched_models import patched
from small_encoders import encode, lora_for_t5, patched_clip, small_t5, t5_file

from devtools.files import tiny_models
from devtools.files.gguf_files import write_random_gguf
from featherweight.loaders.models.placement import place, place_clip
from featherweight.ops.layers import workspace
from featherweight.ops.patcher.residency import PAGE

GIB, MIB = 1 << 30, 1 << 20
# of a layer that is dequantised at a time, on the CPU too: other slices give other last bits
SLICE = MIB
COMPUTING = 32 * MIB  # bytes that a step takes beside weights and the buffers they travel through
INPUTS = 100_000  # bytes that a step sends beside weights
BY_LOADING = 100_000  # and what loading a second time does
LAYERS, WIDTH = 22, 512  # of a text encoder of 98 MB
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
    assert copied <= patcher.full_size() - pages * PAGE + largest_layer(patcher) + INPUTS
    assert gpu.peak() <= before + patcher.placement.gpu_bytes + buffers(patcher) + COMPUTING


def buffers(patcher) -> int:
    """What layers travel through: one buffer for each stream, in dynamic VRAM of whole pages."""
    streams = comfy.model_management.NUM_STREAMS
    return (
        (streams + 1) * -(-largest_layer(patcher) // PAGE) * PAGE
        if patcher.is_dynamic()
        else streams * largest_layer(patcher)
    )


def tell(what: str, gpu):
    """For whoever runs it with `-s`."""
    print(f"{what}: peak {gpu.peak() / 1e6:.1f} MB, copied {gpu.copied().up / 1e6:.1f} MB")


@pytest.mark.parametrize("is_dynamic", BOTH)
def test_a_text_encoder_runs_on_a_gpu_that_is_smaller(is_dynamic, gpu, monkeypatch):
    values = {name: value for name, value in t5_file("Q8_0", LAYERS, WIDTH)[1].items()
              if "relative_attention_bias" not in name}
    stack = ((lora_for_t5(values, seed=1, rank=4), 0.7),
             (lora_for_t5(values, seed=2, rank=3), -0.4))

    def load(options: dict):
        return patched_clip(small_t5("Q8_0", LAYERS, WIDTH, **options)[0], *stack)

    gpu.set_capacity(gpu.used() + 90 * MIB)
    pages = 0 if is_dynamic else 1  # comfy-aimdo keeps more free than this device has
    check(Subject(load, encode, place_clip), pages, 40 * MIB, gpu, monkeypatch)


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
