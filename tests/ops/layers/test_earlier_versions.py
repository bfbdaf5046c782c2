"""Layers that version 0.2.1 pickled are what they were."""
from pathlib import Path

import torch

from featherweight.ops.layers import comfyui_operations  # noqa: F401  as a ComfyUI with the pack has it
from featherweight.ops.tensor.packed_layout import is_packed

# name -> (a layer, the values of its weight), one of each family of layouts and of each weight that
# is made of others, as `torch.save` of version 0.2.1 wrote them
SAVED = Path(__file__).with_name("layers_of_0_2_1.pt")


def test_layers_of_0_2_1_hold_their_packed_weights_and_compute():
    saved = torch.load(SAVED, weights_only=False)
    assert len(saved) == 26
    for name, (layer, values) in saved.items():
        assert is_packed(layer.weight), name
        assert torch.equal(layer.weight.dequantize(), values), name
        input = torch.randn(3, values.shape[1])
        torch.testing.assert_close(layer(input), input @ values.t(), rtol=1e-4, atol=1e-3,
                                   equal_nan=True)
