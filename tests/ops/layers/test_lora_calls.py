"""How many calls of Python LoRAs add to a layer on a GPU: on fast cards these take longer than the
kernels that they start."""
import dataclasses

import pytest
import torch
from pack_api import FORMATS, packed_operations, packed_tensor
from patched_layers import plain_lora
from python_calls import python_calls

from featherweight.ops import kernels
from featherweight.ops.kernels.cuda_backend import BACKEND
from featherweight.ops.layers import joint_product
from featherweight.ops.patches.layer_patches import build_patches

pytestmark = pytest.mark.fake_gpus(devices=1)
GPU = torch.device("cuda", 0)
ROWS, COLUMNS, TOKENS = 1024, 256, 512
MOST_ADDED = 13


@pytest.fixture
def compiled(monkeypatch):
    """Every kernel of the backend is there, and does nothing."""
    def look_up(capability, device, packed_format, dtype):
        found = tuple(dataclasses.replace(kernel, run=lambda *_: None)
                      for kernel in BACKEND.kernels if kernel.capability == capability
                      and kernel.accepts(packed_format, dtype))
        return kernels._found.setdefault((capability, device, packed_format, dtype), found)

    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr(kernels, "_look_up", look_up)


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_loras_add_few_calls(count, tokens, compiled):
    packed_format = FORMATS["Q4_K"]
    layer = packed_operations().Linear(COLUMNS, ROWS, dtype=torch.bfloat16)
    data = torch.zeros((ROWS * COLUMNS // packed_format.block_length, packed_format.block_bytes),
                       dtype=torch.uint8)
    layer.load_state_dict({"weight": packed_tensor(packed_format, data, (ROWS, COLUMNS)),
                           "bias": torch.zeros(ROWS)})
    layer = layer.to(GPU)
    input = torch.zeros(tokens, COLUMNS, dtype=torch.bfloat16, device=GPU)
    without = python_calls(layer, input)
    patches = [(1.0, plain_lora(ROWS, COLUMNS, rank=16), 1.0, None, None)] * count
    layer.lora = build_patches("weight", patches, layer.weight.shape, GPU, torch.bfloat16)
    with_loras = python_calls(layer, input)
    added = with_loras - without
    assert sum(with_loras.values()) - sum(without.values()) <= MOST_ADDED, added
    assert (f"{joint_product.__file__} linear" in added) == (tokens > 1)
