"""Torch's default dtype is not ours: another program of the process changes it, transformers while
it loads a model."""
import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import ONE_OF_EACH_BLOCK
from pack_api import (
    FORMATS,
    SecondMoments,
    check,
    cpp_backend,
    packed_tensor,
    packed_tensors,
    product,
    random_tensors,
)

from featherweight.ops.formats import bits
from featherweight.ops.formats.rotation import rotation_signs
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.packing import pack_tensor as quantize

CPU = torch.device("cpu")
PACK = Path(__file__).parents[3]
MAKE = {"empty", "zeros", "ones", "full", "tensor", "linspace", "logspace", "rand", "randn", "eye"}
ROWS, COLUMNS = 16, 512
EACH = [
    *ONE_OF_EACH_BLOCK,
    *(FAMILIES[name].of_columns(COLUMNS)
      for name in ("INT8", "INT8_ROWS", "F8_E4M3", "F8_E5M2", "INT8_GROUPS", "MXFP8", "NVFP4_ROWS",
                   "NVFP4_LOW", "INT8_CONVROT", "INT4_CONVROT", "W4A8", "W4A8_INTEGERS", "W6A8"))
]
each_format = pytest.mark.parametrize("fmt", EACH, ids=lambda fmt: fmt.name)
has_compiler = sys.platform != "win32" and (
    os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
)


@pytest.fixture
def under(monkeypatch, one_thread):
    """under(dtype, work): what `work` returns where that is the default and nothing has been made
    before."""
    def under(dtype, work):
        for cache in (rotation_signs, bits.shifts):
            cache.cache_clear()
        for packed_format in FORMATS.values():
            monkeypatch.setattr(packed_format, "_constants", {})
        torch.set_default_dtype(dtype)
        try:
            return work()
        finally:
            torch.set_default_dtype(torch.float32)

    yield under
    under(torch.float32, lambda: None)


def assert_same(under, work):
    expected, found = under(torch.float32, work), under(torch.float16, work)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        for one, other in zip(found, expected, strict=True))


def weight_of(fmt):
    tensors = random_tensors(fmt, ROWS * COLUMNS // fmt.block_length, CPU, bounded=True)
    return packed_tensor(fmt, tensors[0], (ROWS, COLUMNS), torch.float32, *tensors[1:])


def input_of(dtype):
    return torch.randn((5, COLUMNS), generator=torch.Generator().manual_seed(0),
                       dtype=torch.float32).to(dtype)


@each_format
def test_values_and_products_are_those_of_any_default_dtype(fmt, under):
    def work():
        weight, inputs = (
            weight_of(fmt),
            [input_of(dtype) for dtype in (torch.float32, torch.bfloat16)],
        )
        return [
            product.dequantize(weight, torch.float32),
            *(product.linear(input, weight, fast=fast) for input in inputs
              for fast in (False, True))
        ]

    assert_same(under, work)


@pytest.mark.parametrize("fmt", list(filter(quantize.can_pack, EACH)), ids=lambda fmt: fmt.name)
def test_a_weight_is_packed_alike_at_any_default_dtype(fmt, under):
    def work():
        dense = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(1),
                            dtype=torch.float32)
        moments = SecondMoments.zeros(COLUMNS)
        moments.add(input_of(torch.float32))
        ways = [{}, {"importance": torch.arange(1, COLUMNS + 1)}, {"moments": moments}]
        return [
            part for way in ways for part in packed_tensors(quantize.pack_tensor(dense, fmt, **way))
        ]

    assert_same(under, work)


@pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler")
@pytest.mark.parametrize("kernel", [
    pytest.param(kernel, id=f"{kernel.capability}-{len(kernel.formats)}",
                 marks=() if kernel.capability in ("linear", "attention") else pytest.mark.heavy)
    for kernel in cpp_backend.BACKEND.kernels])
def test_a_kernel_of_a_cpu_is_right_at_any_default_dtype(kernel, under):
    dtypes = {
        "dequantize": torch.bfloat16, "linear": torch.bfloat16, "int8_tokens": torch.bfloat16,
        "int8_rows": torch.int8, "add_rounded": torch.float16
    }
    dtype = dtypes.get(kernel.capability, torch.float32)
    accepted = [fmt for fmt in [FORMATS["Q4_K"], *EACH] if kernel.accepts(fmt, dtype)]
    fmt = accepted[0] if kernel.formats else None
    under(torch.float16, lambda: check(kernel, fmt, dtype, CPU))


@pytest.mark.skipif(not has_compiler, reason="needs a C++ compiler")
def test_a_kernel_never_writes_into_memory_of_the_default_dtype(under, monkeypatch):
    """It sums in float32, and half as much memory would be written past its end."""
    linear = next(kernel for kernel in cpp_backend.BACKEND.kernels
                  if kernel.capability == "linear" and torch.float16 in kernel.dtypes)
    made, empty = [], torch.empty
    out = torch.empty((1, ROWS), dtype=torch.float16)
    tensors = random_tensors(FORMATS["Q4_K"], ROWS * COLUMNS // 256, CPU, bounded=True)

    def watched(*arguments, **options):
        made.append(empty(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", watched)
    under(
        torch.bfloat16, lambda: linear.run(FORMATS["Q4_K"], tensors,
                                           input_of(torch.float16)[:1], None, out))
    assert [tensor.dtype for tensor in made] == [torch.float32]


def test_what_makes_a_tensor_says_of_which_dtype():
    missing = [
        f"{path.relative_to(PACK)}:{node.lineno}"
        for folder in ("ops", "loaders") for path in sorted((PACK / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr in MAKE and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and "dtype" not in {option.arg for option in node.keywords}]
    assert not missing
