"""Kernels of formats whose block is a row: one source for every platform."""
import ctypes
import random

import kernel_backends
import pytest
import torch
from kernel_backends import backend_on_cpu, change_source
from kernel_cases import (
    CPU,
    ROW_FORMATS,
    USUAL_ROWS,
    assert_same_bits,
    row_format,
    shared_cache,
)
from pack_api import FORMATS, ROW_TYPES, check, cpp_backend, product, random_tensors

from featherweight.ops import kernels
from featherweight.ops.formats._names import formats_of_key
from featherweight.ops.formats.column_groups import ColumnGroups
from featherweight.ops.formats.low_rank_and_joined import AddedLowRank, Joined, Scaled
from featherweight.ops.formats.row_layout import COLUMNS_OF_EXAMPLE, FAMILIES
from featherweight.ops.formats.svdquant import ShiftedInput
from featherweight.ops.kernels import cuda_backend, kernel_source, metal_backend
from featherweight.ops.kernels.kernel import QUANTIZING, multiplies
from featherweight.ops.kernels.runtime_compiler import GpuError
from featherweight.ops.kernels.validation import WrongResult

BACKENDS = ("cpp", "nvrtc", "metal")
GPUS = ("nvrtc", "hiprtc with warps of 64", "metal")
# what no kernel dequantises, and why
WITHOUT_KERNEL = {
    "F16": "a cast", "BF16": "a cast", "ColumnGroups": "by its parts",
    "AddedLowRank": "by its parts", "Joined": "by its parts", "Scaled": "by its parts",
    "ShiftedInput": "by its parts"}
ROTATED = [fmt for fmt in USUAL_ROWS if fmt.layout.rotation]
UNROTATED = [fmt for fmt in USUAL_ROWS if not fmt.layout.rotation]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, tmp_path_factory):
    with backend_on_cpu(request.param, shared_cache(tmp_path_factory)) as backend:
        yield backend


def of(backends):
    return pytest.mark.parametrize("backend", backends, indirect=True)


def dequantize_kernel(backend, fmt):
    kernel, = (kernel for kernel in backend.kernels
               if kernel.capability == "dequantize" and kernel.accepts(fmt, torch.float32))
    return kernel


def dequantized(backend, fmt, tensors, rows, dtype=torch.float32):
    out = torch.full((rows, fmt.block_length), 7.0, dtype=dtype)
    dequantize_kernel(backend, fmt).run(fmt, tensors, out, 0)
    return out


def reference(fmt, tensors, rows, dtype=torch.float32):
    return fmt.dequantize_into(tensors, torch.empty(rows, fmt.block_length, dtype=dtype))


@pytest.mark.parametrize("module", [cpp_backend, cuda_backend, metal_backend],
                         ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_format_of_a_file_has_a_kernel_but_for_the_named(module):
    formats = {name: fmt for name, fmt in FORMATS.items() if not fmt.arguments}
    formats |= {name: family.of_columns(3072) for name, family in FAMILIES.items()}
    q8_0 = FORMATS["Q8_0"]
    formats |= {type(fmt).__name__: fmt for fmt in (
        ColumnGroups.of(q8_0, 128, 2, 2), Joined.of(0, (q8_0, 1, 32), (q8_0, 1, 32)),
        Scaled.of(q8_0, 32, False), ShiftedInput.of(q8_0),
        AddedLowRank.of(q8_0, 4, torch.float16, torch.float16, False))}
    kernels = [kernel for kernel in module.BACKEND.kernels if kernel.capability == "dequantize"]
    missing = {name for name, fmt in formats.items()
               if not any(kernel.accepts(fmt, torch.bfloat16) for kernel in kernels)}
    assert missing == set(WITHOUT_KERNEL)


# The backends share the source: a CPU's has each constant, the two of GPUs a ninth of these each.
@pytest.mark.parametrize(("backend", "fmt"), [
    pytest.param(name, fmt, id=f"{name}-{fmt}", marks=() if fmt in USUAL_ROWS and (
        name == "cpp" or USUAL_ROWS.index(fmt) % 9 == BACKENDS.index(name)) else pytest.mark.heavy)
    for name in BACKENDS for fmt in ROW_FORMATS], indirect=["backend"])
def test_a_row_has_the_bits_of_the_reference(fmt, backend):
    check(dequantize_kernel(backend, fmt), fmt, torch.bfloat16, CPU)


# with half of the lanes
@pytest.mark.parametrize("fmt", [
    pytest.param(fmt, marks=pytest.mark.heavy if number % 6 else ())
    for number, fmt in enumerate(USUAL_ROWS)], ids=str)
@of(["cpp"])
def test_eight_lanes_have_the_bits_too(fmt, backend, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_max_lanes", lambda: 8)
    check(dequantize_kernel(backend, fmt), fmt, torch.bfloat16, CPU)


@pytest.mark.parametrize("seed", [
    pytest.param(seed, marks=pytest.mark.heavy if seed > 2 else ()) for seed in range(6)])
@of(["cpp", pytest.param("nvrtc", marks=pytest.mark.heavy)])
def test_a_layout_of_random_sizes_has_the_bits_of_the_reference(seed, backend):
    draw = random.Random(seed)
    for _ in range(2):
        bits, group = draw.randint(1, 8), draw.choice((0, draw.randint(1, 9) * draw.choice((1, 8))))
        rotation = draw.choice((0, 0, 4, 16, 64, 256))
        taps = 1 if rotation else draw.choice((1, 1, 3, 9))
        name = draw.choice([f"SDNQ_UINT{bits}", f"SDNQ_INT{max(2, bits)}", f"SDNQ_CODEBOOK{bits}"])
        sizes = (group, taps, rotation, draw.choice((2, 4)), draw.randrange(4), draw.randrange(4))
        check(dequantize_kernel(backend, row_format(name, sizes)), row_format(name, sizes),
              torch.float16, CPU)


@pytest.mark.parametrize("fmt", [
    row_format(name) for name in ("F8_E4M3", "INT8_CONVROT", "W6A8", "SVDQUANT_INT4", "SDNQ_UINT4",
                                  "UINT4_GROUPED")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@of([pytest.param(name, marks=() if name == "cpp" else pytest.mark.heavy) for name in BACKENDS])
def test_values_are_rounded_once(dtype, fmt, backend):
    check(dequantize_kernel(backend, fmt), fmt, dtype, CPU)


@pytest.mark.parametrize("fmt", [
    fmt if fmt.family in ("INT8_ROWS", "NVFP4_ROWS", "W4A16", "UINT4_GROUPED", "SVDQUANT_INT4")
    else pytest.param(fmt, marks=pytest.mark.heavy)
    for fmt in [*UNROTATED, row_format("INT8_ROWS"), row_format("SVDQUANT_INT4")]], ids=str)
@of(["cpp", "nvrtc"])
def test_a_product_with_rows_is_right(fmt, backend):
    kernels = [kernel for kernel in backend.kernels
               if kernel.capability == "linear" and kernel.accepts(fmt, torch.bfloat16)]
    assert kernels
    for kernel in kernels:
        check(kernel, fmt, torch.bfloat16, CPU)


@pytest.mark.parametrize("fmt", [row_format("INT8"), row_format("MXFP8"),
                                 row_format("SDNQ_UINT4", (16, 9))], ids=str)
@of(["cpp"])
def test_codes_of_rows_are_right(fmt, backend):
    kernel, = (kernel for kernel in backend.kernels if kernel.capability == "int8_rows"
               and kernel.accepts(fmt, torch.int8))
    check(kernel, fmt, torch.int8, CPU)


def test_rotated_rows_are_left_to_another_product():
    for fmt in ROTATED:
        for kernel in cpp_backend.BACKEND.kernels:
            is_product = kernel.capability not in {"dequantize", *QUANTIZING}
            assert not (is_product and kernel.accepts(fmt, torch.bfloat16))


# --- one source for rows of all lengths ---


@pytest.mark.parametrize("platform", ["cpu", "cuda", "metal"])
def test_rows_of_all_lengths_have_one_source(platform):
    for fmt in ROW_FORMATS:
        sources = {kernel_source.kernel_source(platform, "dequantize_rows", example, torch.float32)
                   for example in formats_of_key(fmt.kernel_key)}
        assert len(sources) == 1, fmt


def test_a_key_has_formats_of_several_lengths():
    for fmt in ROW_FORMATS:
        examples = formats_of_key(fmt.kernel_key)
        assert {example.kernel_key for example in examples} == {fmt.kernel_key}
        columns = [example.block_length for example in examples]
        shortest = min(columns) if min(columns) * 3 not in columns else min(columns) // 3
        assert len(set(columns)) == len(columns) >= 2, fmt
        assert any(length // shortest % 2 for length in columns)
    assert FORMATS["Q4_K"].kernel_key == "Q4_K"
    assert formats_of_key("NF4_96") == [FORMATS["NF4"].of_block_length(96)]
    for key in ("INT8_ROWS_8", "W4A8_1", "NO_FORMAT"):
        with pytest.raises(KeyError):
            formats_of_key(key)


def test_another_length_of_rows_compiles_nothing(tmp_path):
    with backend_on_cpu("cpp", tmp_path) as backend:
        for columns in (64, 1024, 5120):
            fmt = FAMILIES["F8_E4M3"].of_columns(columns)
            dequantized(backend, fmt, random_tensors(fmt, 3, CPU), 3)
    assert len(list(tmp_path.rglob("*.so"))) == 1


# --- rows that kernels do not take ---


@pytest.mark.parametrize("name", ["F8_E4M3", "UINT4_GROUPED"])
def test_a_row_of_odd_length_is_left_to_the_reference(name, backend):
    fmt = FAMILIES[name].of_columns(20)
    tensors = random_tensors(fmt, 5, CPU, bounded=True)
    assert torch.equal(dequantized(backend, fmt, tensors, 5), reference(fmt, tensors, 5))
    assert not multiplies(fmt, 20)


def test_a_row_of_several_blocks_is_not_multiplied_by_kernels():
    """They have scales of their own."""
    for family in FAMILIES.values():
        fmt = family.of_columns(COLUMNS_OF_EXAMPLE)
        length = fmt.block_length
        assert multiplies(fmt, length) and not multiplies(fmt, 2 * length), family.name


def test_every_byte_of_fp8_has_its_value(backend):
    codes = torch.arange(256).to(torch.uint8).repeat(3)
    for name in ("F8_E4M3", "F8_E5M2"):
        fmt, tensors = FAMILIES[name].of_columns(256), [codes, torch.tensor([1.0, -0.75, 1e-30])]
        assert_same_bits(dequantized(backend, fmt, tensors, 3), reference(fmt, tensors, 3))


@pytest.mark.parametrize("name", ["MXFP8", "NVFP4_ROWS", "NVFP4_QUOTIENT"])
def test_every_byte_of_a_scale_has_its_value(name, backend):
    fmt = FAMILIES[name].of_columns(256 * FAMILIES[name].sizes[0])
    tensors = random_tensors(fmt, 1, CPU)
    tensors[1] = torch.arange(256).to(torch.uint8)
    assert_same_bits(dequantized(backend, fmt, tensors, 1), reference(fmt, tensors, 1))


# --- what the tests' GPUs see ---


@pytest.fixture
def libraries(monkeypatch):
    """The paths of the libraries that have been used."""
    paths, compiled = [], kernel_backends.compiled

    def recorded(*arguments):
        paths.append(compiled(*arguments))
        return paths[-1]

    monkeypatch.setattr(kernel_backends, "compiled", recorded)
    return paths


@pytest.mark.parametrize(("name", "family", "sizes"), [
    (GPUS[0], "INT8_CONVROT", (64,)), (GPUS[1], "SDNQ_UINT4", (32, 1, 16, 4)),
    (GPUS[1], "SDNQ_INT8", (0, 1, 4096, 4)), (GPUS[2], "W4A8_SHIFTED", ())])
def test_each_code_of_a_rotated_group_is_decoded_once(name, family, sizes, tmp_path, libraries,
                                                      monkeypatch):
    change_source(monkeypatch, "static FUNCTION Ints codes_at(Packed from) {",
                  'extern "C" { long long decoded; }\n'
                  "static FUNCTION Ints codes_at(Packed from) {\n    decoded += LANES;")
    fmt, rows = row_format(family, sizes), 5
    with backend_on_cpu(name, tmp_path) as backend:
        tensors = random_tensors(fmt, rows, CPU)
        assert_same_bits(dequantized(backend, fmt, tensors, rows), reference(fmt, tensors, rows))
    decoded = ctypes.c_longlong.in_dll(ctypes.CDLL(libraries[-1]), "decoded")
    assert decoded.value == rows * fmt.block_length


@pytest.mark.parametrize("name", GPUS)
def test_a_missing_barrier_is_seen(name, tmp_path, monkeypatch):
    change_source(monkeypatch, "wait_for_threads();\n        for", "for")
    fmt = row_format("INT8_CONVROT")
    with backend_on_cpu(name, tmp_path) as backend, \
            pytest.raises(WrongResult, match="differ from the reference"):
        check(dequantize_kernel(backend, fmt), fmt, torch.float32, CPU)


@pytest.mark.parametrize(("name", "error"), [("nvrtc", GpuError), ("metal", AssertionError)])
def test_a_thread_that_reaches_no_barrier_is_seen(name, error, tmp_path, monkeypatch):
    change_source(monkeypatch, "Floats values[CHUNKS];",
                  "if (row >= rows) return; Floats values[CHUNKS];")
    fmt = row_format("INT8_CONVROT")
    with backend_on_cpu(name, tmp_path) as backend, pytest.raises(error):
        check(dequantize_kernel(backend, fmt), fmt, torch.float32, CPU)


@pytest.mark.parametrize(("name", "first_row"), [
    ("cpp", ("[=](Index row) { ", "[=](Index row) { if (row >= rows - 8) ")),
    ("nvrtc", ("Index first = (Index)blockIdx.y * HEIGHT;", "Index first = rows - 8;")),
    ("metal", ("row = (Index)tile.y * HEIGHT", "row = rows - 8"))], ids=BACKENDS)
def test_rows_behind_many_values_are_found(name, first_row, tmp_path, monkeypatch):
    """A weight of 2**31 values and more, of which only the last rows are in memory."""
    change_source(monkeypatch, *first_row)
    grid = kernel_source.row_grid
    for module in (cuda_backend, metal_backend):
        monkeypatch.setattr(module, "row_grid", lambda fmt, rows: grid(fmt, 8))
    fmt = FAMILIES["W4A16"].of_columns(8192)
    rows, last = (1 << 31) // 8192 + 9, slice(-8, None)
    few = random_tensors(fmt, 8, CPU, bounded=True)
    with backend_on_cpu(name, tmp_path) as backend:
        tensors = [torch.empty(rows * len(part) // 8, dtype=part.dtype) for part in few]
        for part, whole in zip(few, tensors):
            whole[-len(part):] = part
        out = torch.empty(rows, 8192, dtype=torch.float16)
        dequantize_kernel(backend, fmt).run(fmt, tensors, out, 0)
    assert_same_bits(out[last], reference(fmt, few, 8, torch.float16))


@pytest.mark.parametrize("change", [
    ("values * part.scale", "values"), ("n[1] = p - s", "n[1] = s - p"),
    ("row_scales[row] : Scale", "row_scales[0] : Scale"), (", 127.0f);", ", 126.0f);")],
    ids=["scales", "rotation", "scales of rows", "limit"])
def test_a_wrong_source_is_seen(change, tmp_path, monkeypatch):
    change_source(monkeypatch, *change)
    fmt = row_format("W4A8")
    with backend_on_cpu("cpp", tmp_path) as backend, \
            pytest.raises(WrongResult, match="differ from the reference"):
        check(dequantize_kernel(backend, fmt), fmt, torch.float32, CPU)


@pytest.mark.parametrize("columns", [12, 37, 40])
def test_rows_that_no_kernel_takes_are_multiplied_by_torch(columns, monkeypatch):
    asked, find = [], kernels.find
    monkeypatch.setattr(kernels, "find",
                        lambda op, *case, **more: asked.append(op) or find(op, *case, **more))
    packed = ROW_TYPES["float8_e4m3fn"].pack(torch.randn(24, columns))
    input = torch.randn(3, columns)
    expected = input @ packed.dequantize().T
    assert torch.allclose(product.linear(input, packed), expected, rtol=1e-4, atol=1e-4)
    assert ("linear" in asked) == (columns % 8 == 0)
