"""Models of which a part is copied to the GPU in each step: with LoRAs it is the same packed bytes,
and at most the LoRAs' factors more."""
import comfy.model_management
import pytest
import torch
from gpu_memory import BOTH, step
from host_formats import HOST_FORMATS
from patched_models import (
    flux_file,
    lora_for,
    packed_flux,
    packed_layers,
    parts,
    patched,
)

from featherweight.loaders.models.placement import place

OTHERS = 100_000  # bytes of what a step copies beside weights, and of weights in no layer of ours
def weight_bytes(patcher) -> list[torch.Tensor]:
    """The bytes of all quantised weights."""
    return [part.reshape(-1).view(torch.uint8).cpu() for layer in packed_layers(patcher)
            for part in parts(layer.weight)]


@pytest.mark.parametrize("is_dynamic", BOTH)
@pytest.mark.parametrize("format_name", [
    "Q8_0", "int8_tensorwise", *(pytest.param(name, marks=pytest.mark.heavy)
                                 for name in HOST_FORMATS if name != "int8_tensorwise")])
def test_with_loras_a_step_copies_their_factors_more_at_most(format_name, is_dynamic, gpu):
    packed, values = packed_flux(format_name), flux_file(format_name)[1]
    stack = [(lora_for(values, seed=seed), 0.3) for seed in (1, 2, 3)]
    before, size = weight_bytes(packed), packed.model_size()
    # a page of dynamic VRAM is larger than the model, of which then nothing stays
    share, copied = 0 if is_dynamic else 0.4, []
    for patcher in (packed, patched(packed, *stack)):
        factors = patcher.model_size() - size
        placed = place(patcher, share * size + factors)
        comfy.model_management.load_models_gpu([placed])
        step(placed)  # in dynamic VRAM, what stays comes now
        gpu.reset()
        step(placed)
        copied.append(gpu.copied().up)
    assert (0.9 - share) * size < copied[0] < (1.1 - share) * size + OTHERS
    assert copied[1] <= copied[0] + factors
    assert all(map(torch.equal, weight_bytes(packed), before))


@pytest.mark.parametrize("is_dynamic", BOTH)
@pytest.mark.parametrize("format_name", ["int8_tensorwise", "float8_e4m3fn"])
def test_a_streamed_step_has_the_loras_of_one_that_is_not(format_name, is_dynamic, gpu):
    packed, values = packed_flux(format_name), flux_file(format_name)[1]
    first, second = (patched(packed, (lora_for(values, seed=seed), 0.7)) for seed in (1, 2))
    outputs = {}
    for share in (2, 0):
        outputs[share] = []
        for patcher in (packed, first, second, packed, first):
            placed = place(patcher, share * packed.model_size() + 1e6)
            comfy.model_management.load_models_gpu([placed])
            outputs[share].append(step(placed))
    assert all(map(torch.equal, outputs[2], outputs[0]))
    assert not torch.equal(outputs[0][1], outputs[0][2])
