"""Kernels of convolutions in ComfyUI's own formats, which its layers do not read."""
import itertools
import json
import random

import pytest
import torch
from damaged_marks import assert_refused
from host_formats import mark_of, saved
from kernel_writer import SCALES, write_kernel
from pack_api import is_packed, open_weights, packed_operations
from safetensors.torch import save_file

from featherweight.loaders.comfyui.comfy_quant_weights import as_tensors, read_marked
from featherweight.loaders.models.loader_choice import needs_own_reader
from featherweight.loaders.quantizers.comfy_quant import pack_parts, row_type_of
from featherweight.loaders.quantizers.comfy_quant_formats import COMFYUI_FORMATS
from featherweight.ops.formats._names import format_named
from featherweight.ops.tensor.row_slicing import join_rows, take_rows

OF_KERNELS = [name for name, known in COMFYUI_FORMATS.items() if known.read_kernel]


def random_kernels():
    draw = random.Random(7)
    for name, scale, taps in itertools.product(OF_KERNELS, SCALES, (1, 2, 3)):
        sizes = tuple(draw.randrange(1, 5) for _ in range(taps))
        shape = (draw.randrange(1, 20), draw.randrange(1, 20), *sizes)
        yield pytest.param(shape, name, scale, 0, id=f"{name} {scale} {shape}")
    for taps, group in itertools.product((1, 2, 3), (4, 16, 64)):
        drawn = tuple(draw.randrange(1, 5) for _ in range(taps))
        for sizes in (drawn, (1,) * taps):
            shape = (draw.randrange(1, 20), group * draw.randrange(1, 4), *sizes)
            yield pytest.param(shape, "int8_tensorwise", "kernels", group,
                               id=f"rotated {group} {shape}")


@pytest.mark.parametrize(("shape", "name", "scale", "group"), list(random_kernels()))
def test_a_kernel_becomes_one_packed_tensor_of_its_writers_values(shape, name, scale, group,
                                                                  tmp_path):
    parts, values = write_kernel(torch.randn(shape) * 0.02, name, scale, group)
    path = saved(tmp_path / "a.safetensors", parts)
    assert needs_own_reader(path)
    file = open_weights(path)
    formats = random.choice([COMFYUI_FORMATS, ()])
    weight, = as_tensors(file, read_marked(file), formats=formats).values()
    assert is_packed(weight) and weight.shape == shape and row_type_of(weight) is None
    assert (weight.dequantize() - values).abs().max() <= 1e-6 * values.abs().max()
    assert weight.nbytes <= parts["weight"].nbytes + 4 * shape[0]
    assert format_named(weight.params.format.name) is weight.params.format
    some = take_rows(weight, slice(0, -(-shape[0] // 2)))
    assert is_packed(some) and torch.equal(some.dequantize(), weight.dequantize()[:len(some)])
    joined = join_rows([some, some])
    assert is_packed(joined) and torch.equal(joined.dequantize()[len(some):], some.dequantize())


@pytest.mark.parametrize(("kind", "group", "dtype"), [
    (1, 0, torch.float32), (2, 16, torch.float32), (2, 0, torch.bfloat16),
    (3, 16, torch.bfloat16)])
def test_a_layer_convolves_with_the_values(kind, group, dtype):
    parts, values = write_kernel(torch.randn(12, 32, *(3,) * kind) * 0.1, group=group)
    mark = json.loads(parts.pop("comfy_quant").numpy().tobytes())
    layer = getattr(packed_operations(), f"Conv{kind}d")(32, 12, 3, padding=1, dtype=dtype)
    layer.load_state_dict({"weight": pack_parts(mark, parts), "bias": torch.ones(12)})
    assert is_packed(layer.weight)
    input = torch.randn(2, 32, *(9,) * kind).to(dtype)
    convolve = getattr(torch.nn.functional, f"conv{kind}d")
    expected = convolve(input.double(), values.to(dtype).double(), torch.ones(12).double(),
                        padding=1)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert (layer(input) - expected).abs().max() < limit * expected.abs().max()


def test_the_header_marks_kernels_too(tmp_path):
    parts, values = write_kernel(torch.randn(6, 8, 3, 3))
    mark = json.loads(parts.pop("comfy_quant").numpy().tobytes())
    path = saved(tmp_path / "a.safetensors", parts,
                 {"_quantization_metadata": json.dumps({"layers": {"L": mark}})})
    assert needs_own_reader(path)
    file = open_weights(path)
    weight, = as_tensors(file, read_marked(file)).values()
    assert (weight.dequantize() - values).abs().max() <= 1e-6 * values.abs().max()


def test_old_scaled_fp8_has_kernels_too(tmp_path):
    parts, values = write_kernel(torch.randn(6, 8, 3, 3), "float8_e4m3fn", "one")
    path = tmp_path / "a.safetensors"
    save_file({"L.weight": parts["weight"], "L.scale_weight": parts["weight_scale"],
               "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, path)
    file = open_weights(path)
    weights = as_tensors(file, read_marked(file))
    assert torch.equal(weights["L.weight"].dequantize(), values)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["int8_tensorwise", "float8_e4m3fn", "float8_e5m2"])
def test_kernels_without_a_mark_have_scales_too(name, scale, tmp_path):
    parts, values = write_kernel(torch.randn(6, 8, 3, 3), name, scale)
    del parts["comfy_quant"]
    weight, = open_weights(saved(tmp_path / "a.safetensors", parts)).state_dict().values()
    assert is_packed(weight) and torch.equal(weight.dequantize(), values)


def mark(**settings):
    return mark_of(settings)


INT8 = "int8_tensorwise"
# case -> (changes of the parts of (6, 8, 3, 3), what the message says)
BAD = {
    "scales of other rows": ({"weight_scale": torch.ones(5)}, r"weight_scale of float32 \(5,\)"),
    "scales of channels": ({"weight_scale": torch.ones(1, 8, 1, 1)}, "with N = 6"),
    "scales of positions": ({"weight_scale": torch.ones(6, 1, 3, 3)}, "with N = 6"),
    "no scales": ({"weight_scale": None}, "it has no weight_scale"),
    "scales of integers": ({"weight_scale": torch.ones(6).int()}, "weight_scale of int32"),
    "scales of nothing": ({"weight_scale": torch.ones(0)}, r"weight_scale of float32 \(0,\)"),
    "codes of 16 bits": ({"weight": torch.ones(6, 8, 3, 3).short()}, "weight of int16"),
    "codes of fp8": ({"weight": torch.ones(6, 8, 3, 3).to(torch.float8_e5m2)},
                     "names a format that its weights are not in|weight of float8_e5m2"),
    "codes of nothing": ({"weight": torch.ones(6, 0, 3, 3).char()}, "expected rows of codes"),
    "six dimensions": ({"weight": torch.ones(6, 1, 1, 1, 1, 8).char(),
                        "weight_scale": torch.ones(5)}, "weight_scale of float32"),
    "factors of the input": ({"pre_quant_scale": torch.ones(8)}, "it has pre_quant_scale"),
    "a second scale": ({"weight_scale_3": torch.ones(1)}, "it has weight_scale_3"),
    "groups of 8": ({"comfy_quant": mark(format=INT8, convrot=True, convrot_groupsize=8)},
                    "groups of 8 of 8"),
    "groups of 256": ({"comfy_quant": mark(format=INT8, convrot=True)}, "groups of 256 of 8"),
    "groups of 0": ({"comfy_quant": mark(format=INT8, convrot=True, convrot_groupsize=0)},
                    "groups of 0 of 8"),
    "groups of gigabytes": (
        {"comfy_quant": mark(format=INT8, convrot=True, convrot_groupsize=1 << 40)},
        "groups of 1099511627776"),
    "groups of text": ({"comfy_quant": mark(format=INT8, convrot=True, convrot_groupsize="a")},
                       "groups of 0 of 8"),
    "nvfp4": ({"comfy_quant": mark(format="nvfp4")}, "the kernel of a convolution, expected one"),
    "mxfp8": ({"comfy_quant": mark(format="mxfp8")}, "the kernel of a convolution, expected one"),
    "w6a8": ({"comfy_quant": mark(format="w6a8_int8")}, "the kernel of a convolution, expected"),
    "blocks": ({"comfy_quant": mark(format="int8_blockwise")}, "the kernel of a convolution, exp"),
    "an unknown format": ({"comfy_quant": mark(format="int3")}, "a convolution in 'int3'"),
    "no format": ({"comfy_quant": mark(convrot=True)}, "a convolution in ''"),
    "a list": ({"comfy_quant": mark(format=INT8)[1:]}, "is not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_kernels_are_a_sentence_with_file_and_layer(case, tmp_path):
    changes, message = BAD[case]
    parts, _ = write_kernel(torch.randn(6, 8, 3, 3))
    parts = {name: part for name, part in (parts | changes).items() if part is not None}
    path = saved(tmp_path / "model.safetensors", parts)
    assert_refused(path, message)


