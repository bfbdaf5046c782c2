"""What every backend in C++ holds to, run on this CPU: the values of gguf and bitsandbytes, the cases
of `check`, and a device that uses it. What is one backend's own is in a file of its name; Triton's,
which runs in its interpreter alone, in test_kernels_triton.py."""
import logging

import pytest
import torch
from featherweight.ops import kernels as kernel_layer
from featherweight.ops.format import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels import cpp_backend, metal_backend, nvrtc_backend, registry
from featherweight.ops.kernels.check import check, random_tensors
from kernel_backends import BACKENDS, backend_on_cpu
from kernel_cases import (
    ALL_FORMATS, DTYPES, ONE_OF_EACH_SOURCE, assert_a_weak_lora_arrives,
    assert_layer_equals_the_dense_one, assert_odd_weight_is_right, assert_product_rounds_once,
    assert_same_bits, each_dtype, reference, wait_for_kernels,
)

CPU = torch.device("cpu")
WITH_PRODUCTS = [name for name in BACKENDS if name != "metal"]
WITH_CODES = [name for name in BACKENDS if name.startswith("cpp")]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, tmp_path_factory):
    with backend_on_cpu(request.param, tmp_path_factory.mktemp("kernels")) as backend:
        yield backend


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)


def of(backends):
    return pytest.mark.parametrize("backend", backends, indirect=True)


def each_format_and_dtype(dtypes=DTYPES):
    """Every format meets the first dtype, a format of each source the others; the rest is heavy."""
    cases = [pytest.param(fmt, dtype, id=f"{fmt.__name__}-{dtype}",
                          marks=() if dtype == dtypes[0] or fmt in ONE_OF_EACH_SOURCE
                          else pytest.mark.heavy)
             for dtype in dtypes for fmt in ALL_FORMATS]
    return pytest.mark.parametrize("fmt, dtype", cases)


def kernels_of(backend, capability):
    return [kernel for kernel in backend.kernels if kernel.capability == capability]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("three_threads")
@each_format_and_dtype()
def test_unpack_gives_the_values_of_gguf_and_bitsandbytes(backend, fmt, dtype):
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 600, CPU)
    expected = reference(fmt, tensors)
    out = torch.empty(len(expected), dtype=dtype)
    kernels_of(backend, "unpack")[0].run(fmt, tensors, out, None, 0)
    assert_same_bits(out, expected.to(dtype))


@each_format_and_dtype()
def test_unpack_is_right_in_each_case_of_the_check(backend, fmt, dtype):
    check(kernels_of(backend, "unpack")[0], fmt, dtype, None, CPU)


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Q6_K", "NF4"])
def test_unpack_rounds_to_the_value_dtype_first(backend, name, value_dtype):
    check(kernels_of(backend, "unpack")[0], FORMATS[name], torch.float32, value_dtype, CPU)


@pytest.mark.parametrize("shape", [(7, 72), (5, 45), (0, 64)], ids=str)
def test_unpack_of_odd_weights_and_of_none(backend, shape):
    assert_odd_weight_is_right(kernels_of(backend, "unpack")[0].run, shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_are_rounded_once(backend, dtype):
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65520.0, 65519.99, 1 + 2 ** -8,
             1 + 3 * 2 ** -8, 2.0 ** -25, 3.39e38]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 16, (991,), generator=generator)
    values = torch.randn(991, generator=generator) * 2.0 ** exponents
    values = torch.cat([values, torch.tensor(edges)])
    codes = torch.ones(len(values), 8, dtype=torch.uint8)
    out = torch.empty(len(values), 8, dtype=dtype)
    run = kernels_of(backend, "unpack")[0].run
    run(INT8.of_columns(8), [codes.flatten(), values], out, None, 0)
    assert_same_bits(out, values.to(dtype).unsqueeze(-1).expand(-1, 8))


@of(["cpp", "nvrtc"])
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.__name__)
def test_a_product_is_right_in_each_case_of_the_check(backend, fmt):
    check(kernels_of(backend, "linear")[0], fmt, torch.bfloat16, None, CPU)


@of(WITH_PRODUCTS)
@each_dtype
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16])
@pytest.mark.usefixtures("three_threads")
def test_a_product_sums_in_float32_and_rounds_once(backend, tokens, dtype):
    kernels = [kernel for kernel in kernels_of(backend, "linear") if kernel.takes(tokens)]
    if not kernels:
        pytest.skip("multiplies fewer rows")
    assert_product_rounds_once(kernels, tokens, dtype, offset=1)  # loads of four bytes and more


@of(WITH_PRODUCTS)
def test_each_number_of_rows_has_one_product(backend):
    kernels = kernels_of(backend, "linear")
    most = max(kernel.max_tokens for kernel in kernels)
    for tokens in range(1, most + 2):
        assert sum(kernel.takes(tokens) for kernel in kernels) == (tokens <= most)


@pytest.mark.parametrize("backend, fmt", [
    pytest.param(name, fmt, id=f"{name}-{fmt.__name__}",
                 marks=() if name == "cpp" or fmt in ONE_OF_EACH_SOURCE else pytest.mark.heavy)
    for name in WITH_CODES for fmt in ALL_FORMATS], indirect=["backend"])
def test_codes_of_a_weights_rows_are_right(backend, fmt):
    check(kernels_of(backend, "int8_rows")[0], fmt, torch.int8, None, CPU)


@of(WITH_CODES)
@pytest.mark.usefixtures("three_threads")
def test_codes_are_those_of_values_rounded_to_the_value_dtype(backend):
    kernel = kernels_of(backend, "int8_rows")[0]
    check(kernel, FORMATS["Q6_K"], torch.int8, torch.bfloat16, CPU)


@of(WITH_CODES)
@each_dtype
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_of_the_inputs_rows_are_right(backend, threads, dtype, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(kernels_of(backend, "int8_tokens")[0], None, dtype, None, CPU)


# --- a device that uses it ---


@pytest.fixture
def device(backend, monkeypatch, caplog):
    """The CPU, where this is its only backend."""
    monkeypatch.setitem(kernel_layer.PRIORITY, "cpu", (backend.name,))
    monkeypatch.setitem(registry.IMPORTS, backend.name, lambda: backend)
    monkeypatch.setattr(kernel_layer, "_selectors", {})
    monkeypatch.setenv(kernel_layer.VARIABLE, backend.name)
    wait_for_kernels(monkeypatch)
    caplog.set_level(logging.DEBUG)
    return CPU


ONCE = ["cpp", "nvrtc", "metal"]


@of(ONCE)
def test_a_device_uses_it(backend, device):
    fmt, out = FORMATS["Q5_1"], torch.empty(8 * 32)
    tensors = random_tensors(fmt, 8, CPU)
    run = kernel_layer.find("unpack", device, fmt, out.dtype)
    assert run is kernels_of(backend, "unpack")[0].run
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out), reference(fmt, tensors))
    assert kernel_layer.used(device) == kernel_layer.backend_of(device) == backend.name


@of(ONCE)
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("name", ["Q4_K", "NF4"])
def test_a_layer_with_bias_and_low_rank_branch_gives_the_values_of_the_dense_one(
        device, name, tokens):
    assert_layer_equals_the_dense_one(FORMATS[name], (2, max(1, tokens // 2)))


@of(ONCE)
@pytest.mark.parametrize("wrong, dtype, value_dtype", [
    ("7", torch.float16, torch.bfloat16), ("eight", torch.bfloat16, torch.float16)],
    ids=["wrong values", "no C++"])  # of which nothing else is compiled
def test_a_wrong_source_is_off_with_the_reason_and_the_reference_is_used(
        backend, device, wrong, dtype, value_dtype, monkeypatch, caplog):
    for module in (cpp_backend, nvrtc_backend, metal_backend):
        def changed(*args, real=module.kernel_source, **more):
            source = real(*args, **more)
            assert "- 8)" in source
            return source.replace("- 8)", f"- {wrong})")

        monkeypatch.setattr(module, "kernel_source", changed)
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32, dtype=dtype)
    tensors = random_tensors(fmt, 8, CPU)
    assert kernel_layer.find("unpack", device, fmt, dtype, value_dtype) is None
    assert_same_bits(kernel_layer.unpack_into(fmt, tensors, out, value_dtype),
                     fmt.unpack_into(tensors, torch.empty_like(out), value_dtype))
    assert "unpack of Q4_0 to" in caplog.text
    assert ("values differ from the reference" if wrong == "7" else wrong) in caplog.text


@of(ONCE)
@pytest.mark.parametrize("tokens", [1, 4, pytest.param(16, marks=pytest.mark.heavy), 40])
def test_a_weak_lora_arrives(device, tokens):
    assert_a_weak_lora_arrives(tokens)
