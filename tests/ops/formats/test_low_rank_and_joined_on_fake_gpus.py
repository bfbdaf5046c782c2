"""Weights with a low rank of their own, and joined ones, travel to a GPU like any packed weight."""
import comfy.model_management
import comfy.sd
import pytest
import torch
from gpu_memory import BOTH
from pack_api import is_packed, join_packed, packed_tensor, with_low_rank
from patched_models import (
    LIMIT,
    error_by_effect,
    forget_models,
    forward,
    lora_for,
    packed_layers,
    patched,
    relative,
    run,
    tiny_flux,
)

from featherweight.ops.formats.comfy_quant import INT8_ROWS
from featherweight.ops.formats.low_rank_and_joined import Composite
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.patcher import adopt

CPU = torch.device("cpu")


def int8(values: torch.Tensor):
    scales = values.abs().amax(1) / 127
    codes = (values / scales[:, None]).round().to(torch.int8)
    return packed_tensor(INT8_ROWS.of_columns(values.shape[1]), codes.view(torch.uint8).view(-1),
                         values.shape, torch.float32, scales)


def ranked(values: torch.Tensor, generator: torch.Generator):
    rows, columns = values.shape
    up, down = (torch.randn(shape, generator=generator).bfloat16() / 20
                for shape in ((rows, 4), (4, columns)))
    return with_low_rank(int8(values), up, down)


def weights() -> dict[str, torch.Tensor]:
    """A small Flux whose matrices have low ranks, those of single blocks in joined parts."""
    generator = torch.Generator().manual_seed(0)
    state_dict: dict = {}
    for name, values in tiny_flux().items():
        if values.ndim != 2:
            state_dict[name] = values
        elif "single_blocks" in name and name.endswith("linear1.weight"):
            parts = [ranked(part, generator) for part in values.split([512, len(values) - 512])]
            state_dict[name] = join_packed(parts, 0)
        elif "single_blocks" in name and name.endswith("linear2.weight"):
            parts = values.split([256, values.shape[1] - 256], 1)
            state_dict[name] = join_packed([ranked(part.contiguous(), generator)
                                            for part in parts], 1)
        else:
            state_dict[name] = ranked(values, generator)
    return state_dict


@pytest.fixture
def models(one_thread):
    """(model on the GPU, the host's dense model on the CPU, its values)"""
    state_dict = weights()
    values = {name: weight.dequantize() if is_packed(weight) else weight
              for name, weight in state_dict.items()}
    packed = adopt(comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options={"custom_operations": operations_for(state_dict)}))
    dense = comfy.sd.load_diffusion_model_state_dict(
        dict(values), model_options={"load_device": CPU, "offload_device": CPU})
    yield packed, dense, values
    forget_models()


def step(patcher, share: float | None = None) -> torch.Tensor:
    """One step with so much of the model on the GPU; None: all of it."""
    comfy.model_management.unload_all_models()
    if share is None:
        return run(patcher)
    patcher.partially_load(patcher.load_device, int(share * patcher.model_size()))
    return forward(patcher)


@pytest.mark.parametrize("dynamic", BOTH)
def test_a_model_computes_on_a_gpu_as_on_the_cpu_however_much_of_it_fits(models, dynamic):
    packed, dense, _ = models
    assert packed.is_dynamic() == dynamic
    layers = packed_layers(packed)
    assert sum(isinstance(layer.weight.params.format, Composite) for layer in layers) > 15
    expected = run(dense)
    for share in (None, 0.5, 0.01):
        assert relative(step(packed, share), expected) < LIMIT
    assert len(packed_layers(packed)) == len(layers)


@pytest.mark.parametrize("dynamic", BOTH)
def test_loras_and_doras_change_switch_and_go(models, dynamic):
    packed, dense, values = models
    without = run(dense)
    first, dora = lora_for(values, seed=1), lora_for(values, "dora", seed=2)
    for stack in ([(first, 1.0)], [(first, 0.3), (dora, 0.8)], [(dora, 1.0)]):
        expected = run(patched(dense, *stack))
        for share in (None, 0.4):
            assert error_by_effect(step(patched(packed, *stack), share), expected, without) < LIMIT
    assert relative(step(packed), without) < LIMIT
