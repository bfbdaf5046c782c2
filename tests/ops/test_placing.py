"""A budget for one model: what of it lies on its device, which layers, what is copied in each step, and what a store keeps."""
import gc

import comfy.model_management
import pytest
import torch
from featherweight.loaders.placing import place
from gpu_memory import lies_on, step
from patched_models import flux_file, lora_for, packed_flux, patched

pytestmark = pytest.mark.fake_gpus(devices=2, gib=4, late=True)
BUDGETS = (0.5, 0.9, 0.25, 0.7, 0.0, 0.4, 2.0, 0.6)


@pytest.fixture(autouse=True)
def gpu():
    """The counters of the devices, on which nothing lies before and after."""
    import fakegpu

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fakegpu
    torch.set_num_threads(threads)
    comfy.model_management.unload_all_models()
    gc.collect()


def named_elsewhere(patcher) -> int:
    """What lies on the device in any case: factors of LoRAs, and tables that are no layer's, such as that of sigmas."""
    return patcher.model.packed_patches.nbytes + sum(buffer.nbytes for buffer in patcher.model.buffers())


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("format_name", ["Q8_0", "INT8"])
def test_no_more_than_the_budget_lies_on_the_gpu_and_the_rest_is_copied_once_a_step(format_name, cast, with_lora, gpu):
    packed = packed_flux(format_name)
    stack = [(lora_for(flux_file(format_name)[1]), 1.0)] if with_lora else []
    patcher = patched(packed, *stack).clone()
    patcher.force_cast_weights = cast
    comfy.model_management.load_models_gpu([patcher])
    expected, size = step(patcher), patcher.model_size()
    largest = max(entry[-4] for entry in patcher._load_list())
    for part in BUDGETS:
        placed = place(patcher, part * size)
        comfy.model_management.load_models_gpu([placed])
        on_gpu = lies_on(placed.model)
        assert on_gpu == placed.loaded_size() <= max(part * size, named_elsewhere(placed))
        gpu.reset()
        assert torch.equal(step(placed), expected)
        assert gpu.copied().up <= max(0, size - part * size) + largest + 20_000
        gpu.reset()
        comfy.model_management.load_models_gpu([placed])
        assert gpu.copied().up == 0
