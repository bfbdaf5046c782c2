"""On a GPU: what the host counts as loaded lies there and nothing more, what it pins it can, and
LoRAs are sent once."""
import logging

import comfy.model_management
import comfy.sd
import gpu_memory
import pytest
import torch
from gpu_memory import BOTH, copied_by, larger_flux, largest_layer, lies_on, step
from patched_models import flux_file, lora_for, packed_flux, patched
from patcher_models import Subject, load, patcher_of
from small_encoders import small_t5

from featherweight.ops.patcher.residency import PAGE

pytestmark = pytest.mark.usefixtures("gpu")
STATIC = pytest.mark.fake_gpus
FEW = 200_000  # factors and buffers, which stay on the device whatever the room
SHARES = {  # of a model's size: a budget, or what the GPU has room for
    "budget": (0.5, 0.9, 0.25, 0.0, 2.0, 0.6, 0.2, 1.5),
    "room": (0.9, 0.7, 0.3, 0.55, 1.5, 0.4, 0.2, 0.65, 0.75, 0.8, 0.6)}
MORE_ROOMS = (0.8, 0.5, *(0.4 + 0.06 * step for step in range(9)))


def subject_of(name: str) -> Subject:
    """name: of a format; with "cast", where the host casts each weight, as it does to compute in
    another dtype."""
    if name == "text encoder":
        return Subject.of_t5(*small_t5("Q8_0", 2, width=256))
    format_name, _, how = name.partition(" ")
    values = flux_file(format_name)[1]
    if how == "the host's":
        return Subject.of_flux(comfy.sd.load_diffusion_model_state_dict(dict(values)), values)
    patcher = packed_flux(format_name).clone()
    patcher.force_cast_weights = how == "cast"
    return Subject.of_flux(patcher, values)


def beside(patcher) -> int:
    """What lies on the device in any case: factors of LoRAs, and tables that are no layer's, such
    as that of sigmas."""
    of_no_layer = sum(buffer.nbytes for buffer in patcher.model.buffers())
    return patcher.model.packed_patches.nbytes + max(4, of_no_layer)  # a scale of a text encoder


@STATIC
@pytest.mark.more_with_heavy
@pytest.mark.parametrize(("name", "with_lora", "limit"), [
    ("Q8_0", True, "budget"), ("Q8_0 cast", False, "budget"), ("INT8", False, "budget"),
    ("INT8 cast", True, "budget"), ("Q8_0 the host's", False, "budget"),
    ("text encoder", False, "budget"),
    ("Q8_0 cast", False, "room"), ("INT8", True, "room"), ("text encoder", False, "room")])
def test_what_is_counted_lies_on_the_gpu_and_nothing_more_and_the_rest_is_copied_once_a_step(
        name, with_lora, limit, gpu, request):
    subject = subject_of(name)
    model = subject.patched(subject.model, *[(subject.lora, 1.0)] * with_lora)
    patcher = patcher_of(model)
    assert patcher.force_cast_weights == (name == "text encoder" or "cast" in name)
    load(patcher)
    expected, size = subject.run(model), patcher.model_size()
    inputs = copied_by(subject.run, model)  # and what else a run sends when nothing is streamed
    heavy = limit == "room" and request.config.getoption("--heavy")
    for share in (*SHARES[limit], *MORE_ROOMS) if heavy else SHARES[limit]:
        if limit == "budget":
            placed = subject.place(model, share * size)
            load(patcher_of(placed))
            most = max(share * size, beside(patcher_of(placed)))
        else:
            placed, most = model, max(share * size, FEW * (name != "text encoder"))
            gpu_memory.load(patcher, share * size)
        patcher = patcher_of(placed)
        assert lies_on(patcher.model) == patcher.loaded_size() <= most
        gpu.reset()
        assert torch.equal(subject.run(placed), expected)
        if limit == "budget":
            assert gpu.copied().up <= max(0, size - share * size) + largest_layer(patcher) + inputs
            assert copied_by(load, patcher) == 0
            lies = patcher.memory_report()
            assert lies.size == patcher.full_size() >= lies.on_device + lies.copied
            assert share < 1 or lies.on_device == lies.size


def set_free_main_memory(nbytes: int, monkeypatch):
    """Has ComfyUI see some bytes of free main memory, and of a GPU's what is there."""
    free = comfy.model_management.get_free_memory
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device=None, **options: nbytes
        if device == torch.device("cpu") else free(device, **options))


@STATIC
@pytest.mark.parametrize("format_name", ["Q8_0", "INT8"])
def test_weights_that_stay_in_their_file_are_pinned(format_name, gpu, caplog, monkeypatch):
    set_free_main_memory(64 << 30, monkeypatch)  # whatever else the machine does
    patcher = packed_flux(format_name)
    before, refused = gpu.pinned(), gpu.refused_pins()
    with caplog.at_level(logging.WARNING):
        gpu_memory.load(patcher, 0.6 * patcher.model_size())
    left = patcher.model_size() - patcher.loaded_size()
    assert gpu.refused_pins() == refused and "Pin error" not in caplog.text
    assert 0.9 * left < gpu.pinned() - before <= left
    # from pinned memory, with `late` on: whoever does not wait computes with NaN
    assert copied_by(step, patcher) > 0.9 * left


@STATIC
def test_a_weight_that_finds_no_room_for_a_copy_stays_in_its_file(gpu, monkeypatch):
    patcher = packed_flux("Q8_0")
    before, refused = gpu.pinned(), gpu.refused_pins()
    set_free_main_memory(1 << 20, monkeypatch)
    gpu_memory.load(patcher, 0.6 * patcher.model_size())
    # but for what lies in no file
    assert gpu.pinned() - before < 20_000 and gpu.refused_pins() == refused
    assert step(patcher).isfinite().all()


def sent_by_each_load(patcher) -> int:
    """Bytes that the host sends whenever it loads a model in dynamic VRAM: layers of up to 16 KiB,
    and buffers."""
    if not patcher.is_dynamic():
        return 0
    sizes = [size for *_, size, _, module, _ in patcher._load_list()
             if hasattr(module, "comfy_cast_weights") and size <= 1 << 14]
    return sum(sizes) + sum(buffer.nbytes for buffer in patcher.model.buffers())


@pytest.mark.parametrize(("is_dynamic", "kind", "room"), [
    *(pytest.param(*each.values, kind, None, marks=each.marks, id=f"{each.id}-{kind}")
      for each in BOTH for kind in ("model", "text encoder")),
    *(pytest.param(False, "model", room, marks=STATIC) for room in (0.6, 2))])
def test_another_strength_sends_the_factors_once_and_no_weight(is_dynamic, kind, room):
    """room: of the GPU, a share of the model's size, instead of a budget."""
    subject = (Subject.of_flux(*larger_flux("Q8_0"), rank=8) if kind == "model"
               else Subject.of_t5(*small_t5("Q8_0", 10), rank=8))
    factors = sum(tensor.nbytes for tensor in subject.lora.values() if tensor.ndim)
    strong, weak = (subject.patched(subject.model, (subject.lora, strength))
                    for strength in (1.0, 0.5))
    if room is None:
        strong, weak = (subject.place(model, factors + 1.2 * PAGE) for model in (strong, weak))
        load(patcher_of(strong))
    else:
        gpu_memory.load(strong, room * patcher_of(subject.model).model_size())
    subject.run(strong)  # in dynamic VRAM the first run brings in what then stays
    streamed, small = copied_by(subject.run, strong), sent_by_each_load(patcher_of(strong))
    assert small < 20_000
    assert room is not None or streamed < 0.6 * patcher_of(strong).full_size()
    for model, sent in ((strong, 0), (strong.clone(), 0), (weak, factors), (weak.clone(), 0),
                        (strong, factors)):
        assert copied_by(load, patcher_of(model)) == sent + small
        assert copied_by(subject.run, model) == streamed


@STATIC
@pytest.mark.parametrize("cast", [False, True])
def test_layers_that_fall_out_of_a_new_plan_leave_the_gpu(cast, gpu):
    packed = packed_flux("Q8_0")
    packed.force_cast_weights = cast
    fell_out = 0
    for rank in (4, 8, 16, 24):  # whose factors leave room for other layers when they go
        with_lora = patched(packed, (lora_for(flux_file("Q8_0")[1], rank=rank), 1.0))
        for room in (0.5, 0.6, 0.7):
            room *= packed.model_size()
            gpu_memory.load(with_lora, room)
            gpu.reset()
            load(packed)
            assert lies_on(packed.model) == packed.loaded_size() <= room
            fell_out += gpu.copied().down
            comfy.model_management.unload_all_models()
    assert fell_out
