"""What loading copies to the GPU where a budget is, to the byte: models and text encoders.

A text encoder is loaded by the run itself.
"""
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import pytest
from featherweight.loaders.placing import place, place_clip
from featherweight.ops.patcher.placing import PAGE
from gpu_memory import larger_flux, step
from patched_models import lora_for, patched
from small_encoders import encode, lora_for_t5, patched_clip, small_t5

BOTH = [pytest.param(False, marks=pytest.mark.fake_gpus(), id="static"),
        pytest.param(True, marks=pytest.mark.fake_gpus(dynamic=True), id="dynamic")]


class Subject(NamedTuple):
    """A packed model or text encoder, a LoRA for it, and the functions for one of its kind."""
    model: Any
    lora: dict
    patched: Callable
    place: Callable
    run: Callable


@pytest.fixture(params=["model", "text encoder"])
def subject(request, one_thread):
    if request.param == "model":
        with larger_flux("Q8_0") as (packed, values):
            yield Subject(packed, lora_for(values, rank=8), patched, place, step)
    else:
        clip, values = small_t5("Q8_0", 10)
        packed = {name: value for name, value in values.items() if "relative_attention_bias" not in name}
        yield Subject(clip, lora_for_t5(packed, rank=8), patched_clip, place_clip, encode)


@pytest.fixture
def gpu():
    """The counters of the device, on which nothing lies before and after."""
    import fakegpu

    yield fakegpu
    fakegpu.set_capacity(4 << 30)
    comfy.model_management.unload_all_models()
    gc.collect()


def patcher_of(model):
    return getattr(model, "patcher", model)


def load(model):
    comfy.model_management.load_models_gpu([patcher_of(model)])


def copied_by(gpu, function, *arguments) -> int:
    before = gpu.copied().up
    function(*arguments)
    return gpu.copied().up - before


def sent_by_each_load(model) -> int:
    """Bytes that the host sends whenever it loads a model in dynamic VRAM: layers of up to 16 KiB, and buffers."""
    patcher = patcher_of(model)
    if not patcher.is_dynamic():
        return 0
    layers = [(size, module) for *_, size, _, module, _ in patcher._load_list() if hasattr(module, "comfy_cast_weights")]
    return sum(size for size, _ in layers if size <= 1 << 14) + sum(buffer.nbytes for buffer in patcher.model.buffers())


@pytest.mark.parametrize("is_dynamic", BOTH)
def test_another_strength_sends_the_factors_once_and_no_weight(is_dynamic, subject, gpu):
    factors = sum(tensor.nbytes for tensor in subject.lora.values() if tensor.ndim)
    budget = factors + 1.2 * PAGE
    strong, weak = (subject.place(subject.patched(subject.model, (subject.lora, strength)), budget) for strength in (1.0, 0.5))
    load(strong)
    subject.run(strong)  # in dynamic VRAM the first run brings in what then stays
    streamed, small = copied_by(gpu, subject.run, strong), sent_by_each_load(strong)
    assert streamed < 0.6 * patcher_of(strong).full_size()
    assert small < 20_000
    for placed, sent in ((strong, 0), (weak, factors), (weak, 0), (strong, factors)):
        assert copied_by(gpu, load, placed) == sent + small
        assert copied_by(gpu, subject.run, placed) == streamed
