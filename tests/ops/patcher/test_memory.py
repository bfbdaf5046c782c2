"""On a GPU: what the host counts as loaded lies there and nothing more, what it pins it can, and
LoRAs are sent once."""
import logging

import comfy.model_management
import pytest
import torch
from gpu_memory import lies_on, load, step
from patched_models import flux_file, lora_for, packed_flux, patched
from small_encoders import encode, small_t5

pytestmark = [pytest.mark.fake_gpus, pytest.mark.usefixtures("gpu")]
MIB = 1 << 20


FEW = 200_000  # factors and buffers, which stay on the device whatever the room
ROOMS = (0.9, 0.7, 0.3, 0.55, 1.5, 0.4, 0.2)
MORE_ROOMS = (0.8, 0.5, *(0.4 + 0.06 * step for step in range(9)))


@pytest.mark.more_with_heavy
# cast: whether the host casts each weight, as it does to compute in another dtype
@pytest.mark.parametrize(("format_name", "cast", "with_lora"), [
    ("Q8_0", True, False), ("INT8", False, True)])
def test_what_is_counted_lies_on_the_gpu_and_nothing_more(
    format_name, cast, with_lora, gpu, request
):
    packed = packed_flux(format_name)
    stack = [(lora_for(flux_file(format_name)[1]), 1.0)] if with_lora else []
    patcher = patched(packed, *stack).clone()
    patcher.force_cast_weights = cast
    comfy.model_management.load_models_gpu([patcher])
    expected, size = step(patcher), patcher.model_size()
    assert lies_on(patcher.model) == patcher.loaded_size()
    for room in (*ROOMS, *MORE_ROOMS) if request.config.getoption("--heavy") else ROOMS:
        load(patcher, room * size)
        assert lies_on(patcher.model) == patcher.loaded_size() <= max(room * size, FEW)
        assert torch.equal(step(patcher), expected)


def test_what_is_counted_of_a_text_encoder_lies_on_the_gpu_and_nothing_more(gpu):
    clip, _ = small_t5("Q8_0", 2, width=256)
    size = clip.patcher.model_size()
    assert clip.patcher.force_cast_weights
    expected = encode(clip)
    for room in (0.4, 0.6, 0.8, 0.7, 0.9, 1.5, 0.65, 0.75):
        load(clip.patcher, room * size)
        assert lies_on(clip.patcher.model) == clip.patcher.loaded_size() <= room * size
        assert torch.equal(encode(clip), expected)


def set_free_main_memory(nbytes: int, monkeypatch):
    """Has ComfyUI see some bytes of free main memory, and of a GPU's what is there."""
    free = comfy.model_management.get_free_memory
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device=None, **options: nbytes
        if device == torch.device("cpu") else free(device, **options))


@pytest.mark.parametrize("format_name", ["Q8_0", "INT8"])
def test_weights_that_stay_in_their_file_are_pinned(format_name, gpu, caplog, monkeypatch):
    set_free_main_memory(64 << 30, monkeypatch)  # whatever else the machine does
    patcher = packed_flux(format_name)
    before, refused = gpu.pinned(), gpu.refused_pins()
    with caplog.at_level(logging.WARNING):
        load(patcher, 0.6 * patcher.model_size())
    left = patcher.model_size() - patcher.loaded_size()
    assert gpu.refused_pins() == refused and "Pin error" not in caplog.text
    assert 0.9 * left < gpu.pinned() - before <= left
    gpu.reset()
    step(patcher)
    # from pinned memory, with `late` on: whoever does not wait computes with NaN
    assert gpu.copied().up > 0.9 * left


def test_a_weight_that_finds_no_room_for_a_copy_stays_in_its_file(gpu, monkeypatch):
    patcher = packed_flux("Q8_0")
    before, refused = gpu.pinned(), gpu.refused_pins()
    set_free_main_memory(1 << 20, monkeypatch)
    load(patcher, 0.6 * patcher.model_size())
    # but for what lies in no file
    assert gpu.pinned() - before < 20_000 and gpu.refused_pins() == refused
    assert step(patcher).isfinite().all()


@pytest.mark.parametrize("room", [0.6, 2])
def test_the_factors_of_loras_are_sent_once(room, gpu):
    lora = lora_for(flux_file("Q8_0")[1])
    packed = packed_flux("Q8_0")
    strong, weak = (patched(packed, (lora, strength)) for strength in (1.0, 0.5))
    load(strong, room * packed.model_size())
    read = sum(tensor.nbytes for tensor in lora.values() if tensor.ndim)  # as the file has them
    for patcher, factors in ((strong, 0), (strong.clone(), 0), (weak, read), (weak.clone(), 0),
                             (strong, read)):
        gpu.reset()
        comfy.model_management.load_models_gpu([patcher])
        assert gpu.copied().up == factors


@pytest.mark.parametrize("cast", [False, True])
def test_layers_that_fall_out_of_a_new_plan_leave_the_gpu(cast, gpu):
    packed = packed_flux("Q8_0")
    packed.force_cast_weights = cast
    fell_out = 0
    for rank in (4, 8, 16, 24):  # whose factors leave room for other layers when they go
        with_lora = patched(packed, (lora_for(flux_file("Q8_0")[1], rank=rank), 1.0))
        for room in (0.5, 0.6, 0.7):
            room *= packed.model_size()
            load(with_lora, room)
            gpu.reset()
            comfy.model_management.load_models_gpu([packed])
            assert lies_on(packed.model) == packed.loaded_size() <= room
            fell_out += gpu.copied().down
            comfy.model_management.unload_all_models()
    assert fell_out
