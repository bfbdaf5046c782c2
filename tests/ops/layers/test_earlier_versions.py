"""What versions 0.2.1 and 0.2.2 pickled is what it was, wherever its files are now."""
from pathlib import Path

import torch

from featherweight.loaders.recipe import Recipe
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
        layout = getattr(layer.weight.params.format, "layout", None)
        # the sums of rotated numbers that are no integers had no order
        has_order = not layout or not layout.rotation or not (
            layout.rotates_values or layout.minimum)
        tolerance = 0 if has_order else 1e-6 * values.nan_to_num().abs().max().item()
        torch.testing.assert_close(layer.weight.dequantize(), values, rtol=0, atol=tolerance,
                                   equal_nan=True, msg=name)
        input = torch.randn(3, values.shape[1])
        torch.testing.assert_close(layer(input), input @ values.t(), rtol=1e-4, atol=1e-3,
                                   equal_nan=True)


def test_patches_recipes_and_convolutions_of_0_2_2_open():
    saved = torch.load(SAVED.with_name("pickles_of_0_2_2.pt"), weights_only=False)
    branch = saved["patches"].branch(torch.eye(8))
    torch.testing.assert_close(branch.product(torch.eye(8), 6).t(), saved["product"])
    assert saved["recipe"] == Recipe("diffusion model", ("a.gguf",), {"compute": "exact"})
    torch.testing.assert_close(saved["convolution"](saved["input"]), saved["output"])
