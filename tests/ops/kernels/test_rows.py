"""The kernel of a CPU for formats whose block is a row."""
import shutil

import pytest
import torch
from kernel_backends import backend_on_cpu
from kernel_cases import CPU, CPU_ROW_SIZES, ROW_SIZES, cpu_kernels, each_row_format, shared_cache

from featherweight.ops import formats  # noqa: F401
from featherweight.ops.formats.row_layout import FAMILIES
from featherweight.ops.kernels import cpp_backend, kernel_source
from featherweight.ops.kernels.validation import WrongResult, check, random_tensors

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, cpp_backend.COMPILERS)), reason="needs a C++ compiler")



@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory):
    with cpu_kernels(shared_cache(tmp_path_factory)):
        yield


# which are rare, or in small layers; as are columns of groups in any order
LEFT_TO_TORCH = {"W4A8_TABLE", "W4A8_SHIFTED", "W4A8_SHIFTED_FLOAT"}


def kernel_of(packed_format):
    kernel, = (kernel for kernel in cpp_backend.BACKEND.kernels
               if kernel.capability == "dequantize"
               and kernel.accepts(packed_format, torch.float32))
    return kernel


def test_every_family_of_rows_has_a_kernel():
    """But for SDNQ's codes that select levels and what is listed above."""
    families = {name for name, family in FAMILIES.items()
                if (name in kernel_source.CPU_ROW_FAMILIES or not name.startswith("SDNQ"))
                and not family.example.names_groups}
    assert set(ROW_SIZES) == set(kernel_source.ROW_FAMILIES)
    assert set(CPU_ROW_SIZES) == set(kernel_source.CPU_ROW_FAMILIES)
    assert families == {*kernel_source.CPU_ROW_FAMILIES, "INT8", "INT8_ROWS"} | LEFT_TO_TORCH
    assert all(kernel_of(FAMILIES[name].of_columns(512)) for name in families - LEFT_TO_TORCH)


def is_like_another(name: str) -> bool:
    """Whether a family differs from one of 4 bits, and from one of scales in bfloat16, by both."""
    is_of_group = "GROUPED" in name or "QUANTO" in name
    return is_of_group and "4" not in name and name.endswith(("_HALF", "_FLOAT"))


# the first family of floats of each number of bits, which differ by a table
FLOATS = {name[:len("SDNQ_FLOAT4")]: name for name in reversed(CPU_ROW_SIZES)
          if name.startswith("SDNQ_FLOAT")}


# with half of the lanes, which no family asks for, the first size of every third family
@pytest.mark.parametrize(("name", "size", "lanes"), [
    pytest.param(name, size, lanes, marks=pytest.mark.heavy if (lanes < 16 and number % 3)
                 or FLOATS.get(name[:len("SDNQ_FLOAT4")], name) != name else ())
    for number, (name, sizes) in enumerate(CPU_ROW_SIZES.items())
    if not is_like_another(name)
    for index, size in enumerate(sizes) for lanes in ((16,) if index else (8, 16))], ids=str)
def test_a_row_has_the_bits_of_the_reference(name, size, lanes, monkeypatch):
    if lanes > cpp_backend._max_lanes():
        pytest.skip("needs AVX-512")
    monkeypatch.setattr(cpp_backend, "_max_lanes", lambda: lanes)
    packed_format = FAMILIES[name].of_columns(*size)
    check(kernel_of(packed_format), packed_format, torch.bfloat16, CPU)


@pytest.fixture(scope="module", params=["nvrtc", "metal"])
def gpu_backend(request, tmp_path_factory):
    with backend_on_cpu(request.param, shared_cache(tmp_path_factory)) as backend:
        yield backend


@each_row_format
def test_a_row_has_the_bits_of_the_reference_on_gpus(name, size, gpu_backend):
    packed_format = FAMILIES[name].of_columns(*size)
    kernel, = (kernel for kernel in gpu_backend.kernels
               if kernel.capability == "dequantize"
               and kernel.accepts(packed_format, torch.float32))
    check(kernel, packed_format, torch.bfloat16, CPU)


@pytest.mark.parametrize("name", ["F8_E4M3", "INT8_CONVROT", "W6A8", "SVDQUANT_INT4",
                                  "SDNQ_UINT4", "UINT4_GROUPED"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_are_rounded_once(name, dtype):
    packed_format = FAMILIES[name].of_columns(*CPU_ROW_SIZES[name][0])
    check(kernel_of(packed_format), packed_format, dtype, CPU)


def test_every_byte_of_fp8_has_its_value():
    codes = torch.arange(256).to(torch.uint8).repeat(3)
    for name in ("F8_E4M3", "F8_E5M2"):
        packed_format, scale = FAMILIES[name].of_columns(256), torch.tensor([1.0, 0.75, 1e-30])
        out = torch.empty(3, 256)
        kernel_of(packed_format).run(packed_format, [codes, scale], out, 0)
        expected = packed_format.dequantize_into([codes, scale], torch.empty(3, 256))
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_a_wrong_rotation_is_seen(monkeypatch):
    packed_format = FAMILIES["INT8_CONVROT"].of_columns(512)
    kernel = kernel_of(packed_format)
    right = kernel_source.row_definitions(packed_format)
    monkeypatch.setattr(cpp_backend, "row_definitions", lambda _: right | {"ROTATED": 0})
    with pytest.raises(WrongResult, match="differ from the reference"):
        check(kernel, packed_format, torch.float32, CPU)


def test_a_row_of_odd_length_is_left_to_the_reference():
    packed_format = FAMILIES["F8_E4M3"].of_columns(20)
    tensors, out = random_tensors(packed_format, 5, CPU), torch.empty(5, 20)
    kernel_of(packed_format).run(packed_format, tensors, out, 0)
    assert torch.equal(out, packed_format.dequantize_into(tensors, torch.empty(5, 20)))


@pytest.mark.parametrize("sizes", [(192, 64, 1, 0, 2, 1, 1), (192, 16, 3), (192, 64, 1, 4)],
                         ids=["scales in 16 bits", "scales of taps", "rotated in fours"])
def test_a_row_with_more_than_the_kernel_reads_is_left_to_the_reference(sizes):
    packed_format = FAMILIES["SDNQ_UINT4"].of_columns(*sizes)
    tensors, out = random_tensors(packed_format, 5, CPU, bounded=True), torch.empty(5, 192)
    kernel_of(packed_format).run(packed_format, tensors, out, 0)
    expected = packed_format.dequantize_into(tensors, torch.empty(5, 192))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
