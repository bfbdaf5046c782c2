"""A budget for one model: what of it lies on its device, which layers, what is copied in each step,
and what a store keeps."""
import gc

import comfy.model_management
import comfy.sd
import dynamic_vram
import pytest
import torch
from gpu_memory import copied_by, larger_flux, largest_layer, lies_on, step
from patched_models import lora_for, packed_flux, patched
from patcher_models import load

from featherweight.loaders.models.placement import place
from featherweight.ops.patcher.residency import PAGE

STATIC = pytest.mark.fake_gpus
DYNAMIC = pytest.mark.fake_gpus(dynamic=True)
SECOND, THIRD = torch.device("cuda:1"), torch.device("cuda:2")
UNIT = 512  # bytes, in which a device counts what is used


@DYNAMIC
def test_a_model_of_the_hosts_own_has_one_in_dynamic_vram(gpu):
    patcher = comfy.sd.load_diffusion_model_state_dict(larger_flux("Q8_0")[1])
    load(patcher)
    expected = step(patcher)
    for pages in (3, 0, 1):
        placed = place(patcher, pages * PAGE + 1e6)
        load(placed)
        assert torch.equal(step(placed), expected)
        assert placed._vbar_get().loaded_size() <= pages * PAGE


@STATIC
def test_layers_that_are_copied_lie_between_those_that_stay(gpu):
    packed, _ = larger_flux("Q8_0", hidden=128, double_blocks=4, single_blocks=8)
    placed = place(packed, 0.5 * packed.model_size())
    load(placed)
    layers = "".join(" " if module.weight.device.type == "cuda" else "x"
                     for *_, size, _, module, _ in placed._load_list() if size > 1 << 16)
    in_a_row = list(map(len, layers.split()))
    assert len(layers) > 30 and max(in_a_row) <= 4 and len(in_a_row) > 8


@STATIC
def test_nobody_is_unloaded_for_bytes_that_never_come(gpu, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 1 << 20)
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 1)
    first, second = packed_flux("Q8_0"), packed_flux("Q8_0", 1)
    size = first.model_size()
    gpu.set_capacity(gpu.used() + 1.7 * size + (2 << 20))
    for placed, reloads in ((first, True), (place(first, 0.4 * size), False)):
        for model in (placed, second, placed, second):
            before = gpu.copied().up
            load(model)
        assert (gpu.copied().up > before) == reloads
        comfy.model_management.unload_all_models()


@STATIC
def test_stores_keep_what_they_say_and_are_filled_in_turn(gpu):
    packed, stores = packed_flux("Q8_0"), (SECOND, THIRD)
    load(packed)
    expected, size = step(packed), packed.model_size()
    empty = {store: gpu.used(store.index) for store in stores}
    for budget, *rooms in ((0.3, 0.4, 0), (0.3, 0.2, 0.3), (0.3, 5, 5), (0.1, 0.5, 5), (0, 0, 0.5),
                           (0.6, 0, 0)):
        placed = place(packed, budget * size,
                       [(store, room * size) for store, room in zip(stores, rooms)])
        load(placed)
        lies, left = placed.memory_report(), size - lies_on(placed.model)
        for store, room in zip(stores, rooms):
            stored = lies.stored.get(store, 0)
            assert stored == lies_on(placed.model, store) <= room * size
            assert stored <= gpu.used(store.index) - empty[store] <= stored + 100 * UNIT
            assert room == 0 or stored > min(room * size, left) - largest_layer(placed)
            left -= stored
        assert torch.equal(step(placed), expected) and copied_by(load, placed) == 0
        assert placed.memory_report() == lies
    assert not placed.memory_report().stored
    for several in ([THIRD], [SECOND, THIRD]):
        placed = place(packed, 0.3 * size, [(store, size) for store in several])
        load(placed)
        assert placed.memory_report().stored.keys() == {several[0]}
        assert torch.equal(step(placed), expected)
    comfy.model_management.unload_all_models()
    assert all(gpu.used(store.index) == empty[store] for store in stores)
    assert torch.equal((load(packed), step(packed))[1], expected)


@STATIC
def test_what_a_store_has_no_room_for_lies_in_the_next(gpu):
    packed = packed_flux("Q8_0")
    load(packed)
    expected, size = step(packed), packed.model_size()
    gpu.set_capacity(gpu.used(1) + 0.3 * size, 1)
    placed = place(packed, 0.2 * size, [(SECOND, size), (THIRD, 0.2 * size)])
    load(placed)
    stored = placed.memory_report().stored
    for store, room in ((SECOND, 0.3), (THIRD, 0.2)):
        assert room * size - largest_layer(placed) < stored[store] <= room * size
    assert torch.equal(step(placed), expected)


@DYNAMIC
def test_in_dynamic_vram_no_more_pages_lie_on_the_gpu_than_the_budget_has(gpu):
    dynamic_vram.wait_until_free()
    packed, values = larger_flux("Q8_0")
    lora = lora_for(values, rank=8)
    model, weaker = (patched(packed, (lora, strength)) for strength in (1.0, 0.5))
    load(model)
    expected, size = step(model), packed.full_size()
    assert size > PAGE
    for pages in (1, 0, 2):
        budget = pages * PAGE + model.model.model_loaded_weight_memory
        placed = place(model, budget)
        load(placed)
        assert torch.equal(step(placed), expected)
        gpu.reset()
        assert torch.equal(step(placed), expected)
        assert placed._vbar_get().loaded_size() <= pages * PAGE and placed.loaded_size() <= budget
        assert gpu.copied().up <= max(0, size - pages * PAGE) + 2 * largest_layer(placed)
        lies = placed.memory_report()
        assert lies.copied + lies.on_device == size
        assert abs(gpu.copied().up - lies.copied) < 1e5
        assert copied_by(load, placed) <= 1e5
    weaker = place(weaker, budget)
    assert copied_by(load, weaker) <= sum(tensor.nbytes for tensor in lora.values()) + 1e5


@DYNAMIC
def test_stores_take_a_model_out_of_dynamic_vram(gpu):
    packed = packed_flux("Q8_0")
    load(packed)
    expected, size = step(packed), packed.full_size()
    placed = place(packed, 0.3 * size, [(SECOND, 0.4 * size), (THIRD, size)])
    load(placed)
    assert not placed.is_dynamic() and lies_on(placed.model) <= 0.3 * size
    stored = placed.memory_report().stored
    assert stored == {store: lies_on(placed.model, store) for store in (SECOND, THIRD)}
    assert 0.3 * size < stored[SECOND] <= 0.4 * size
    assert 0.4 * size < sum(stored.values()) == placed.memory_report().copied
    assert torch.equal(step(placed), expected)


@STATIC
def test_a_model_larger_than_the_device_runs_with_two_loras(gpu):
    packed, values = larger_flux("Q8_0")
    room = 0.7 * packed.full_size()  # bytes for weights, activations and buffers
    model = patched(packed, (lora_for(values, seed=1, rank=2), 0.7),
                    (lora_for(values, seed=2, rank=2), -0.4))
    load(model)
    expected = step(model)
    comfy.model_management.unload_all_models()
    comfy.model_management.reset_cast_buffers()
    gc.collect()
    gpu.set_capacity(gpu.used() + room)
    for budget in (0.2 * room, 0):
        placed = place(model, budget)
        load(placed)
        assert torch.equal(step(placed), expected)
