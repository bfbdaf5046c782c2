"""2-D convolutions on a CPU, as a product of matrices and as torch's."""
import comfy.ops
import pytest
import torch
from kernel_cases import cpu_kernels, shared_cache
from pack_api import packed_operations, product
from patched_layers import COPIES
from patched_models import packed_anyhow

from featherweight.ops import cpu_features as cpu_features
from featherweight.ops import kernels
from featherweight.ops.layers import cpu_convolution as cpu_convolution
from featherweight.ops.layers import cpu_linear as cpu_linear

CHANNELS, ROWS = 32, 48
NEEDS_BFLOAT16 = pytest.mark.skipif(not cpu_features.multiplies_bfloat16(),
                                    reason="oneDNN has no bfloat16 on this CPU")


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """A CPU whose products oneDNN makes."""
    monkeypatch.setattr(cpu_linear, "takes", lambda input: True)


def layer_of(format_name, bias=True, **options):
    torch.manual_seed(0)
    layer = packed_operations().Conv2d(CHANNELS, ROWS, bias=bias, dtype=torch.float32, **options)
    values = torch.randn(layer.weight.shape) / 8
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(format_name)
    weight = packed_anyhow(values, format_name)[0] if dtype is None else values.to(dtype)
    parts = {"weight": weight} | ({"bias": torch.randn(ROWS).bfloat16()} if bias else {})
    layer.load_state_dict(parts)
    return layer


def exact_output(layer, input):
    weight = product.dequantize(layer.weight, torch.float32).bfloat16().double()
    bias = None if layer.bias is None else layer.bias.double()
    return torch.nn.functional.conv2d(input.double(), weight, bias, layer.stride, layer.padding,
                                      layer.dilation, layer.groups)


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


each_way = pytest.mark.parametrize("few_pixels", [0, 1 << 20],
                                   ids=["torch's", "a product of matrices"])
GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "of stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "without padding": {"kernel_size": 3},
    "of two lengths": {"kernel_size": (5, 2), "padding": (2, 0), "stride": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@NEEDS_BFLOAT16
@each_way
@pytest.mark.parametrize(("geometry", "bias", "format_name", "memory_format"), [
    *((geometry, True, "Q8_0", torch.contiguous_format) for geometry in GEOMETRIES),
    ("3x3", False, "Q8_0", torch.contiguous_format), ("3x3", True, "Q8_0", torch.channels_last),
    ("3x3", True, "F16", torch.contiguous_format), ("3x3", False, "BF16", torch.channels_last)],
    ids=str)
def test_a_convolution_is_rounded_once(geometry, bias, few_pixels, format_name, memory_format,
                                       monkeypatch):
    monkeypatch.setattr(cpu_convolution, "FEW_PIXELS", few_pixels)
    monkeypatch.setattr(product, "CONVOLUTION_BYTES", 1 << 13)  # several slices of output channels
    monkeypatch.setattr(product, "CORE_CACHE_BYTES", 1 << 11)
    layer = layer_of(format_name, bias, **GEOMETRIES[geometry])
    input = torch.randn(2, CHANNELS, 9, 8).bfloat16().contiguous(memory_format=memory_format)
    if geometry == "circular":
        padded = torch.nn.functional.pad(input, (1, 1, 1, 1), mode="circular")
        exact = exact_output(layer_of(format_name, bias, kernel_size=3), padded)
    else:
        exact = exact_output(layer, input)
    with torch.inference_mode():
        out = layer(input)
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert relative_error(out, exact) < 0.002  # 0.0017: half a step of bfloat16, on average


@NEEDS_BFLOAT16
@each_way
def test_the_channels_of_the_output_are_last(few_pixels, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "FEW_PIXELS", few_pixels)
    with torch.inference_mode():
        out = layer_of("F16", kernel_size=3)(torch.randn(2, CHANNELS, 9, 8).bfloat16())
    assert out.is_contiguous(memory_format=torch.channels_last)


@each_way
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_in_float32_loses_nothing(geometry, few_pixels, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "FEW_PIXELS", few_pixels)
    layer = layer_of("Q8_0", **GEOMETRIES[geometry])
    input = torch.randn(2, CHANNELS, 9, 8)
    weight = product.dequantize(layer.weight, torch.float32)
    with torch.inference_mode():
        expected = layer._conv_forward(input.double(), weight.double(), layer.bias.double())
        assert relative_error(layer(input), expected) < 1e-6


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name not in (
    "dilated", "circular")])
def test_patches_are_in_the_order_of_the_weight(geometry):
    layer = layer_of("F16", bias=False, **GEOMETRIES[geometry])
    input = torch.randn(2, CHANNELS, 9, 8).double()
    weight = product.dequantize(layer.weight, torch.float32).double()
    out = cpu_convolution.multiply_patches(layer, input,
                                           lambda patches: patches @ weight.flatten(1).t())
    expected = torch.nn.functional.conv2d(input, weight, None, layer.stride, layer.padding)
    torch.testing.assert_close(out, expected)


@pytest.mark.skipif(not cpu_features.has_avx512_bfloat16(),
                    reason="needs AVX512-BF16 without AMX, as devtools.limited_cpu gives it")
@pytest.mark.parametrize("format_name", ["F16", "Q8_0"])
def test_with_avx512_a_small_convolution_dequantizes_as_it_multiplies(
        format_name, tmp_path_factory, monkeypatch):
    with cpu_kernels(shared_cache(tmp_path_factory)):
        layer = layer_of(format_name, kernel_size=3)
        monkeypatch.setattr(kernels, "dequantize_into", None)  # which nothing calls
        with torch.inference_mode():
            assert layer(torch.randn(1, CHANNELS, 9, 8).bfloat16()).isfinite().all()


def dense_layer_of_the_host(**options):
    layer = comfy.ops.manual_cast.Conv2d(CHANNELS, ROWS, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return layer


@each_way
@pytest.mark.parametrize("cast", [False, True], ids=["as stored", "cast by the host"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dense_layers_of_the_host_lose_nothing(geometry, cast, few_pixels, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "FEW_PIXELS", few_pixels)
    torch.manual_seed(0)
    layer = dense_layer_of_the_host(**GEOMETRIES[geometry])
    input = torch.randn(2, CHANNELS, 9, 8)
    with torch.inference_mode():
        if cast:
            layer.half()
        expected = layer(input)
        cpu_convolution.convolve_dense_layers(layer)
        torch.testing.assert_close(layer(input), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", ["input", "weight", "bias"])
def test_a_dense_layer_passes_a_gradient(needed):
    layer = dense_layer_of_the_host(kernel_size=1).requires_grad_(False)
    cpu_convolution.convolve_dense_layers(layer)
    tensors = {"input": torch.randn(1, CHANNELS, 4, 4), "weight": layer.weight, "bias": layer.bias}
    tensors[needed].requires_grad_()
    layer(tensors["input"]).square().sum().backward()
    assert tensors[needed].grad.abs().sum() > 0


UNUSUAL_INPUTS = {  # kernel size, shape of the input
    "no batch": (3, (CHANNELS, 9, 8)),
    "smaller than the kernel": (3, (1, CHANNELS, 2, 8)),
    "much smaller than the kernel": (3, (1, CHANNELS, 1, 1)),
    "more channels": (3, (1, CHANNELS + 1, 9, 8)),
    "more channels for one tap": (1, (1, CHANNELS + 1, 9, 8)),
    "too many dimensions": (3, (1, 1, CHANNELS, 9, 8)),
}


def result(layer, input):
    """The output of a layer, or what torch says about its input."""
    try:
        return layer(input)
    except RuntimeError as error:
        return str(error)


@each_way
@pytest.mark.parametrize(("kernel_size", "shape"), UNUSUAL_INPUTS.values(), ids=UNUSUAL_INPUTS)
def test_an_unusual_input_gives_what_torch_gives(kernel_size, shape, few_pixels, monkeypatch):
    monkeypatch.setattr(cpu_convolution, "FEW_PIXELS", few_pixels)
    torch.manual_seed(0)
    input, dense = torch.randn(shape), dense_layer_of_the_host(kernel_size=kernel_size)
    packed = layer_of("F16", kernel_size=kernel_size)
    plain = dense_layer_of_the_host(kernel_size=kernel_size)
    with torch.inference_mode():
        plain.load_state_dict({"weight": product.dequantize(packed.weight, torch.float32),
                               "bias": packed.bias})
        expected = result(dense, input), result(plain, input)
        cpu_convolution.convolve_dense_layers(dense)
        for out, of_torch in zip((result(dense, input), result(packed, input)), expected):
            if isinstance(of_torch, str):
                assert out == of_torch
            else:
                torch.testing.assert_close(out, of_torch)


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a_dense_layer_and_a_vae_are_copied_and_saved_as_the_hosts_are(way):
    vae = torch.nn.Sequential(dense_layer_of_the_host(kernel_size=3, padding=1), torch.nn.SiLU())
    cpu_convolution.convolve_dense_layers(vae)
    input = torch.randn(2, CHANNELS, 9, 8)
    for module in (vae, vae[0]):
        again = way(module)
        assert type(again) is type(module)
        with torch.inference_mode():
            assert torch.equal(again(input), module(input))
