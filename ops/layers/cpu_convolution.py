"""2-D convolutions on a CPU, with the channels of input, weight and output last.

Torch's convolution copies each weight into an order of its own. With the channels last it copies
less, and for small images a product of matrices takes it as it is.
"""
import functools
import math
from collections.abc import Callable, Iterable

import torch

from ..stable_names import stable_pickle_name
from . import cpu_linear
from .product import needs_gradient

# Up to so many pixels of output, a product of matrices is faster, and with one tap always.
FEW_PIXELS = 512


def takes(layer: torch.nn.Conv2d, input: torch.Tensor,
          *parameters: torch.Tensor | None) -> bool:
    """Returns whether `convolve` computes a layer's convolution of an input.

    Torch computes the others, and says what is wrong with an input that does not fit the layer.

    Args:
        layer: its weight and bias are not read.
        input: (batch, channels, height, width), or any other.
        parameters: what else of the convolution may need a gradient.
    """
    return (
        cpu_linear.takes(input)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and set(layer.dilation) == {1}
        and input.ndim == 4
        and input.shape[1] == layer.in_channels
        and min(_output_size(layer, input)) > 0
        and not needs_gradient(input, *parameters)
    )


def convolve_dense_layers(model: torch.nn.Module):
    """Has `convolve` compute the 2-D convolutions of a model with dense weights, where it can."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.__class__ = _with_channels_last(type(layer))


@functools.cache
def _with_channels_last(layer_class: type[torch.nn.Conv2d]) -> type[torch.nn.Conv2d]:
    return type(layer_class.__name__, (_DenseConv2d, layer_class), {"layer_class": layer_class})


@stable_pickle_name
def new_dense_convolution(layer_class: type[torch.nn.Conv2d]) -> torch.nn.Conv2d:
    """Returns an uninitialised layer of a class of `convolve_dense_layers`."""
    return torch.nn.Conv2d.__new__(_with_channels_last(layer_class))


class _DenseConv2d(torch.nn.Conv2d):
    layer_class: type[torch.nn.Conv2d]  # which the layer had before

    def __reduce_ex__(self, protocol):
        return new_dense_convolution, (self.layer_class,), self.__dict__

    def _conv_forward(self, input, weight, bias):
        if not takes(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias)
        if is_product(self, input):
            matrix = weight.flatten(1).contiguous()
            return multiply_patches(self, input,
                                    lambda patches: cpu_linear.linear(patches, matrix, bias))
        weight = weight.contiguous(memory_format=torch.channels_last)
        return convolve(self, input, [(slice(0, len(weight)), weight)], bias)


def is_product(layer: torch.nn.Conv2d, input: torch.Tensor) -> bool:
    """Returns whether `multiply_patches` is faster than `convolve` for what `takes` accepts.

    Args:
        layer: its weight and bias are not read.
        input: (batch, channels, height, width).
    """
    pixels = len(input) * math.prod(_output_size(layer, input))
    return layer.kernel_size == (1, 1) or pixels <= FEW_PIXELS


def multiply_patches(layer: torch.nn.Conv2d, input: torch.Tensor,
                     linear: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Computes the convolution of a layer that `takes` accepts as a product.

    Args:
        layer: its weight and bias are not read.
        input: (batch, channels, height, width).
        linear: computes the product of the patches (pixels, channels * taps), contiguous, with the
            weight (output channels, channels * taps), and adds the bias.

    Returns:
        (batch, output channels, height, width) in memory format `channels_last`.
    """
    size = _output_size(layer, input)
    out = linear(_patches(layer, input, size))
    return out.view(len(input), *size, layer.out_channels).permute(0, 3, 1, 2)


def convolve(layer: torch.nn.Conv2d, input: torch.Tensor,
             slices: Iterable[tuple[slice, torch.Tensor]],
             bias: torch.Tensor | None) -> torch.Tensor:
    """Computes the convolution of a layer that `takes` accepts.

    Args:
        layer: its weight and bias are not read.
        input: (batch, channels, height, width).
        slices: (rows, the weight of these output channels in memory format `channels_last`).
        bias: (output channels,) in the dtype of `input`, or None.

    Returns:
        (batch, output channels, height, width) in memory format `channels_last`.
    """
    input = input.contiguous(memory_format=torch.channels_last)
    out = input.new_empty((len(input), *_output_size(layer, input), layer.out_channels))
    for rows, weight in slices:
        part = torch.nn.functional.conv2d(input, weight, None if bias is None else bias[rows],
                                          layer.stride, layer.padding)
        if len(weight) == layer.out_channels:
            return part
        out[..., rows] = part.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2)


def _output_size(layer: torch.nn.Conv2d, input: torch.Tensor) -> list[int]:
    """Returns height and width of the output, less than 1 where the kernel is too large."""
    assert not isinstance(layer.padding, str)
    return [(length + 2 * padding - taps) // stride + 1 for length, padding, taps, stride
            in zip(input.shape[2:], layer.padding, layer.kernel_size, layer.stride)]


def _patches(layer: torch.nn.Conv2d, input: torch.Tensor, size: list[int]) -> torch.Tensor:
    """Returns what each pixel of the output sees: (pixels, channels * taps).

    Args:
        layer: with its kernel, stride and padding.
        input: (batch, channels, height, width).
        size: height and width of the output.
    """
    assert not isinstance(layer.padding, str)
    rows, columns = layer.padding
    image = torch.nn.functional.pad(input.permute(0, 2, 3, 1),
                                    (0, 0, columns, columns, rows, rows)).contiguous()
    of_image, of_row, of_pixel, _ = image.stride()
    height, width = layer.kernel_size
    down, right = layer.stride
    channels = image.shape[-1]
    windows = image.as_strided(
        (len(image), *size, height, width * channels),
        (of_image, of_row * down, of_pixel * right, of_row, 1))
    # two copies of neighbours are faster than one of single numbers
    windows = windows.reshape(-1, height * width, channels)
    return windows.transpose(1, 2).reshape(len(windows), -1)
