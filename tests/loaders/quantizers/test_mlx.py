"""Weights of MLX against its package."""
import numpy
import pytest
import torch
from conformance.base import read_weight
from oracles import installed
from safetensors.torch import load_file

REQUIREMENTS = "mlx==0.32.4", "mlx-cpu==0.32.4"
AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


@pytest.fixture
def mx(monkeypatch):
    monkeypatch.syspath_prepend(installed(*REQUIREMENTS))
    return pytest.importorskip("mlx.core")


def stored(mx, tmp_path, parts):
    """The parts as MLX itself writes them into a file."""
    mx.save_safetensors(str(tmp_path / "written.safetensors"), parts)
    return load_file(tmp_path / "written.safetensors")


def values(mx, array):
    return torch.from_numpy(numpy.array(array.astype(mx.float32)))


@pytest.mark.heavy
@pytest.mark.parametrize(("bits", "group"), AFFINE)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_affine_values_are_those_of_the_package(mx, bits, group, dtype, tmp_path):
    mx.random.seed(bits * group)
    weight = mx.random.normal((48, 384)).astype(getattr(mx, dtype))
    words, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
    parts = stored(mx, tmp_path, {"weight": words, "scales": scales, "biases": biases})
    packed = read_weight(tmp_path, parts, config={
        "quant_method": "mlx", "bits": bits, "group_size": group}).dequantize()
    expected = values(mx, mx.dequantize(words, scales.astype(mx.float32),
                                        biases.astype(mx.float32), group_size=group, bits=bits))
    # MLX may round the product before it adds the bias, as this pack does, or once
    assert torch.allclose(packed, expected, rtol=0, atol=2.4e-7 * expected.abs().max().item())
    assert packed.eq(expected).double().mean() > 0.9


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_values_without_biases_are_those_of_the_package(mx, mode, tmp_path):
    mx.random.seed(len(mode))
    words, scales = mx.quantize(mx.random.normal((48, 384)), mode=mode)
    parts = stored(mx, tmp_path, {"weight": words, "scales": scales})
    expected = values(mx, mx.dequantize(words, scales, mode=mode, dtype=mx.float32))
    assert torch.equal(read_weight(tmp_path, parts).dequantize(), expected)
