"""What versions 0.2.1 and 0.2.2 pickled is what it was, wherever its files are now."""
from pathlib import Path

import torch
from pack_api import is_packed

from featherweight.loaders.models.load_options import LoadOptions
from featherweight.loaders.recipe import Recipe
from featherweight.ops.layers import EXACT, FAST
from featherweight.ops.layers.comfyui_operations import new_layer

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


def test_fast_layers_and_recipes_that_say_int8_are_fast():
    layer = new_layer("Linear", False, False, "int8")
    assert layer.compute == FAST
    layer = new_layer("Linear", False, False, "automatic")
    layer.__setstate__({"compute": "int8"})  # as chosen for the layer's weight
    assert layer.compute == FAST
    options = LoadOptions(compute="int8", host_formats="exact, from the file's weights")
    assert (options.compute, options.host_formats) == (FAST, EXACT)


def test_patches_recipes_and_convolutions_of_0_2_2_open():
    saved = torch.load(SAVED.with_name("pickles_of_0_2_2.pt"), weights_only=False)
    branch = saved["patches"].branch(torch.eye(8))
    torch.testing.assert_close(branch.product(torch.eye(8), 6).t(), saved["product"])
    assert saved["recipe"] == Recipe("diffusion model", ("a.gguf",), {"compute": "exact"})
    torch.testing.assert_close(saved["convolution"](saved["input"]), saved["output"])
