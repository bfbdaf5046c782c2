"""Every backend has the values of gguf and bitsandbytes, passes the cases of `check`, and is used
by a device. All run on this CPU, and that of a GPU there too. Tests of a single backend are in a
file of its name.

Cases that differ from another one in one respect only are heavy: a CPU dequantizes every format to
float32, the others one of each source, and other dtypes and kernels run with a few formats.
"""
import logging
import random

from devtools.measure.weights import random_weight

import pytest
import torch
from kernel_backends import (
    BACKENDS,
    CPUS,
    GPUS,
    CudaCompiler,
    backend_on_cpu,
    change_source,
    device_of,
)
from kernel_cases import (
    ALL_FORMATS,
    CPU,
    DTYPES,
    ONE_OF_EACH_SOURCE,
    assert_same_bits,
    decide_on_demand,
    reference,
    shared_cache,
)
from lora_gain import assert_full_strength
from pack_api import (
    FORMATS,
    GGML_FORMATS,
    check,
    cpp_backend,
    packed_tensor,
    product,
    random_tensors,
)
from python_calls import python_calls

from featherweight.ops import kernels as kernel_layer
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels import int8_codes, registry
from featherweight.ops.layers import cpu_linear
from featherweight.ops.layers.packed_layers import Linear
from featherweight.ops.low_rank import LowRank, Slice

MAIN = ("cpp", "nvrtc", "metal", "gpu")  # the others are variants of these
WITH_PRODUCTS = [name for name in BACKENDS if name != "metal"]
TWO = FORMATS["Q6_K"], FORMATS["NF4"]  # scales in the blocks and apart
# Of products, which read each format by the code that dequantizes it; on a CPU two of tables more.
FEW = *TWO, FORMATS["Q8_0"], INT8.of_columns(96)
OF_CPUS = *FEW, FORMATS["IQ4_XS"], FORMATS["IQ2_S"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, tmp_path_factory):
    with backend_on_cpu(request.param, shared_cache(tmp_path_factory)) as backend:
        yield backend


@pytest.fixture
def device(backend):
    return device_of(backend)


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: 3)


def of(backends):
    return pytest.mark.parametrize("backend", backends, indirect=True)


def parametrize_cases(backends, formats, dtypes, is_usual):
    """Parametrizes a test by backend, format and dtype.

    Args:
        is_usual: (a backend's name, a format, a dtype) -> whether the case is not heavy.
    """
    cases = []
    for name in backends:
        for dtype in dtypes:
            cases += [pytest.param(name, fmt, dtype, id=f"{name}-{fmt and fmt.name}-{dtype}",
                                   marks=() if is_usual(name, fmt, dtype) else pytest.mark.heavy)
                      for fmt in formats]
    return pytest.mark.parametrize(("backend", "fmt", "dtype"), cases, indirect=["backend"])


def is_usual_dequantize(name, fmt, dtype):
    if dtype != torch.float32 or name not in (*MAIN, "cpp with AVX2"):
        return fmt in TWO
    return name == "cpp" or fmt in ONE_OF_EACH_SOURCE


def is_usual_product(name, fmt, dtype):
    half = torch.bfloat16 if name == "cpp" else torch.float16
    return dtype == half and fmt in (
        OF_CPUS if name == "cpp" else FEW if name in MAIN else TWO)


def kernels_of(backend, capability, fmt=None, dtype=None):
    kernels = [kernel for kernel in backend.kernels if kernel.capability == capability
               and kernel.accepts(fmt, dtype or min(kernel.dtypes, key=str))]
    if not kernels:
        pytest.skip("left to torch")
    return kernels


def dequantize(backend, fmt, tensors, out):
    """Returns what the backend's kernel computes on its device. All tensors are on the CPU."""
    device = device_of(backend)
    values = out.to(device)
    (kernel,) = kernels_of(backend, "dequantize", fmt)
    kernel.run(fmt, [tensor.to(device) for tensor in tensors], values, 0)
    return values.cpu()


@of(MAIN[:3])
def test_every_format_of_ggml_has_a_kernel(backend):
    for fmt in GGML_FORMATS.values():
        assert any(kernel.capability == "dequantize" and kernel.accepts(fmt, torch.float32)
                   for kernel in backend.kernels), fmt


each_dequantize = parametrize_cases(BACKENDS, ALL_FORMATS, DTYPES, is_usual_dequantize)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("three_threads")
@each_dequantize
def test_dequantize_gives_the_values_of_gguf_and_bitsandbytes_in_each_case_of_the_check(
        backend, fmt, dtype, device):
    tensors = random_tensors(fmt, 3 if fmt.block_length > 256 else 100, CPU)
    expected = reference(fmt, tensors)
    out = dequantize(backend, fmt, tensors, torch.empty(len(expected), dtype=dtype))
    assert_same_bits(out, expected.to(dtype))
    check(*kernels_of(backend, "dequantize", fmt), fmt, dtype, device)


@pytest.mark.parametrize("shape", [(7, 72), (5, 45), (0, 64)], ids=str)
def test_dequantize_of_odd_weights_and_of_none(backend, shape):
    """NF4's last block may be short."""
    fmt, count = FORMATS["NF4"], shape[0] * shape[1]
    packed, scales = random_tensors(fmt, -(-count // 64) or 1, CPU)
    tensors = [packed[:-(-count // 2)], scales[:-(-count // 64)]]
    expected = fmt.dequantize_into(tensors, torch.empty(shape, dtype=torch.float16))
    assert_same_bits(dequantize(backend, fmt, tensors, torch.empty_like(expected)), expected)


@parametrize_cases(BACKENDS, [INT8.of_columns(32)], DTYPES[1:], lambda *case: True)
def test_values_are_rounded_once(backend, fmt, dtype):
    edges = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65520.0, 65519.99, 1 + 2 ** -8,
             1 + 3 * 2 ** -8, 2.0 ** -25, 3.39e38]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-24, 16, (991,), generator=generator)
    values = torch.randn(991, generator=generator) * 2.0**exponents
    values = torch.cat([values, torch.tensor(edges)])
    codes = torch.ones(len(values), 32, dtype=torch.uint8)
    tensors = [codes.flatten(), values]
    out = dequantize(backend, fmt, tensors, torch.empty(len(values), 32, dtype=dtype))
    assert_same_bits(out, values.to(dtype).unsqueeze(-1).expand(-1, 32))


@parametrize_cases(["cpp", *GPUS, "gpu"], [*ALL_FORMATS, FORMATS["F16"]], DTYPES[1:],
                   is_usual_product)
def test_a_product_is_right_in_each_case_of_the_check(backend, fmt, dtype, device):
    for kernel in kernels_of(backend, "linear", fmt, dtype):
        check(kernel, fmt, dtype, device)


@parametrize_cases(WITH_PRODUCTS, [FORMATS["Q4_K"]], DTYPES,
                   lambda *case: True)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16])
@pytest.mark.usefixtures("three_threads")
def test_a_product_sums_in_float32_and_rounds_once(backend, tokens, fmt, dtype, device):
    """With an odd number of rows, an addend of odd strides, and an input one value after an aligned
    address. A kernel may round the weight's values to `dtype` before it multiplies."""
    kernels = [kernel for kernel in kernels_of(backend, "linear", fmt, dtype)
               if kernel.takes(tokens)]
    if not kernels:
        pytest.skip("multiplies fewer rows")
    rows, columns = 13, 1280
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, bounded=True)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1 + tokens * columns, generator=generator).to(device, dtype)
    input = values[1:].view(tokens, columns)
    addend = torch.randn((rows, tokens), generator=generator).to(device, dtype).t()
    weight = fmt.dequantize_into(tensors, torch.empty(rows, columns))
    for added in (addend, None):
        out = torch.full((tokens, rows), torch.nan, dtype=dtype, device=device)
        kernels[0].run(fmt, [tensor.to(device) for tensor in tensors], input, added, out)
        assert any(is_rounded_once(out, input, multiplied.double(), added)
                   for multiplied in (weight, weight.to(dtype)))


def is_rounded_once(out, input, weight, added) -> bool:
    """Returns whether `out` is `input @ weight.T + added`, summed in float32. weight: float64."""
    input = input.cpu().double()
    expected = input @ weight.t() + (0 if added is None else added.cpu())
    half_a_step = torch.finfo(out.dtype).eps / 2 * expected.abs()
    allowed = half_a_step + 1e-6 * (input.abs() @ weight.abs().t())
    return bool(((out.cpu() - expected).abs() <= allowed).all())


@of(WITH_PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_number_of_rows_up_to_a_limit_has_a_product(backend, dtype):
    kernels = kernels_of(backend, "linear", dtype=dtype)
    limit = max(kernel.max_tokens for kernel in kernels)
    for tokens in range(1, limit + 2):
        assert any(kernel.takes(tokens) for kernel in kernels) == (tokens <= limit)


@parametrize_cases(
    [*CPUS, *GPUS, "gpu"], ALL_FORMATS, [torch.int8], lambda name, fmt, dtype:
    fmt == TWO[0] or (name == "cpp" and fmt in OF_CPUS) or (name in MAIN and fmt in FEW))
def test_codes_of_a_weights_rows_are_right(backend, fmt, dtype, device):
    check(*kernels_of(backend, "int8_rows", fmt), fmt, dtype, device)


@parametrize_cases(GPUS, [None], [torch.int8], lambda *case: True)
@pytest.mark.parametrize("columns", [256, 3072, 12288, 15360])
def test_a_gpu_encodes_rows_of_the_lengths_of_models(backend, columns, fmt, dtype, device):
    """All rows of a weight, or those behind its first one, of a random format."""
    fmt = random.choice([*map(FORMATS.get, ("Q4_K", "Q8_0", "NF4")), INT8.of_columns(columns)])
    kernel, = kernels_of(backend, "int8_rows", fmt, torch.int8)
    rows, first = random.randint(2, 4), random.randint(0, 1)
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, bounded=True)
    dense = fmt.dequantize_into(tensors, torch.empty(rows, columns))[first:].contiguous()
    expected, codes = (torch.empty(dense.shape, dtype=torch.int8) for _ in range(2))
    expected_scales, scales = torch.empty(len(dense)), torch.empty(len(dense))
    kernel.run(fmt, [tensor.to(device) for tensor in tensors], codes, scales,
               first * columns // fmt.block_length)
    int8_codes.encode_tokens(dense, expected, expected_scales)
    differing = codes.int() - expected
    assert differing.abs().max() <= 1 and differing.count_nonzero() <= 1e-3 * codes.numel()
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)


@parametrize_cases(CPUS, [None], DTYPES, lambda *case: True)
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_of_the_inputs_rows_are_right(backend, threads, fmt, dtype, device, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(*kernels_of(backend, "int8_tokens"), fmt, dtype, device)


@parametrize_cases(["cpp"], [None], DTYPES, lambda *case: True)
@pytest.mark.parametrize("threads", [1, 3])
def test_channels_go_last_in_any_dtype(backend, threads, fmt, dtype, device, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(*kernels_of(backend, "channels_last"), fmt, dtype, device)


@parametrize_cases([*CPUS, *GPUS], [None], DTYPES[1:], lambda *case: True)
@pytest.mark.parametrize("threads", [1, 3])
def test_small_changes_are_added_with_the_references_bits(backend, threads, fmt, dtype, device,
                                                          monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(*kernels_of(backend, "add_rounded"), fmt, dtype, device)


@parametrize_cases(["cpp"], [None], DTYPES, lambda *case: True)
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_is_right(backend, threads, fmt, dtype, device, monkeypatch):
    monkeypatch.setattr(cpp_backend, "_threads", lambda values: threads)
    check(*kernels_of(backend, "attention"), fmt, dtype, device)


# --- a device that uses it ---


@pytest.fixture
def used_by_device(backend, device, monkeypatch, caplog, tmp_path):
    """The device, where this is its only backend."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(kernel_layer.BACKENDS, device.type, backend.name)
    monkeypatch.setitem(registry.IMPORTS, backend.name, lambda: backend)
    monkeypatch.setenv(kernel_layer.VARIABLE, backend.name)
    monkeypatch.setattr(kernel_layer, "ON_REQUEST", ())  # checked here, not in another process
    decide_on_demand(monkeypatch)
    caplog.set_level(logging.DEBUG)
    return device


@of(MAIN)
def test_a_device_uses_it(backend, used_by_device):
    fmt = FORMATS["Q5_1"]
    tensors = random_tensors(fmt, 8, CPU)
    out = torch.empty(8 * 32, device=used_by_device)
    run = kernel_layer.find("dequantize", used_by_device, fmt, out.dtype)
    assert run is kernels_of(backend, "dequantize")[0].run
    on_device = [tensor.to(used_by_device) for tensor in tensors]
    assert_same_bits(kernel_layer.dequantize_into(fmt, on_device, out), reference(fmt, tensors))
    assert kernel_layer.used(used_by_device, [fmt], out.dtype) == kernel_layer.TITLES[backend.name]


@pytest.mark.parametrize(("backend", "name", "tokens"), [
    *((backend, name, tokens)
      for backend in MAIN for name in ("Q4_K", "NF4") for tokens in (3, 40))], indirect=["backend"])
def test_a_layer_with_bias_and_low_rank_branch_gives_the_values_of_the_dense_one(
        used_by_device, name, tokens):
    fmt, device = FORMATS[name], used_by_device
    rows, columns, generator = 20, 512, torch.Generator().manual_seed(0)
    tensors = random_tensors(fmt, rows * columns // fmt.block_length, CPU, bounded=True)
    dense = fmt.dequantize_into(tensors, torch.empty(rows, columns)).double()
    data, *scale = (tensor.to(device) for tensor in tensors)
    weight = packed_tensor(fmt, data, (rows, columns), torch.float32, *scale)
    input, bias, down, up = (torch.randn(shape, generator=generator) for shape in
                             ((2, tokens // 2, columns), (rows,), (4, columns), (rows, 4)))
    low_rank = LowRank(down, (up,), (Slice(0, rows, 0, 4),)).to(device)
    values = product.linear(input.to(device), weight, bias.to(device), low_rank=low_rank)
    changed = dense + up.double() @ down.double()
    expected = torch.nn.functional.linear(input.double(), changed, bias.double())
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-5, atol=1e-3)
    ids = torch.tensor([[3, 0], [19, 3]])
    rows_of_ids = product.embedding(ids.to(device), weight, torch.float32).cpu()
    assert torch.equal(rows_of_ids, dense.float()[ids])


def test_what_one_process_has_compiled_for_a_gpu_the_next_one_loads(tmp_path, monkeypatch):
    compiled, compile_source = [], CudaCompiler.compile

    def counted(*args):
        compiled.append(args)
        return compile_source(*args)

    monkeypatch.setattr(CudaCompiler, "compile", counted)
    fmt, out = FORMATS["Q4_K"], torch.empty(8 * 256)
    tensors = random_tensors(fmt, 8, CPU)
    for is_damaged in (False, False, True):
        for image in tmp_path.rglob("*.image") if is_damaged else ():
            image.write_bytes(b"damaged")
        with backend_on_cpu("nvrtc", tmp_path) as backend:
            kernels_of(backend, "dequantize")[0].run(fmt, tensors, out.zero_(), 0)
        assert_same_bits(out, reference(fmt, tensors))
        assert len(compiled) == 1 + is_damaged


# of ComfyUI and torch 17 are, before and after the product
MOST_CALLS = 60  # a layer with a dense weight that ComfyUI casts makes 28


@of(["nvrtc"])
@pytest.mark.parametrize("name", ["Q4_K", "NF4", "INT8_CONVROT"])
@pytest.mark.parametrize("tokens", [3, 64])
def test_a_layer_makes_few_calls_of_python(used_by_device, name, tokens, monkeypatch):
    monkeypatch.setattr(cpu_linear, "takes", lambda input: False)  # as on a GPU
    weight = random_weight(name, (256, 512))
    layer = Linear(512, 256)
    layer.weight, layer.bias = (torch.nn.Parameter(tensor, requires_grad=False)
                                for tensor in (weight, torch.zeros(256)))
    with torch.inference_mode():
        calls = python_calls(layer, torch.randn(tokens, 512))
    assert sum(calls.values()) <= MOST_CALLS, "\n".join(calls.elements())


@of(MAIN[:3])
@pytest.mark.parametrize(("wrong", "dtype"), [("7", torch.float16), ("eight", torch.bfloat16)],
                         ids=["wrong values", "no C++"])
def test_a_wrong_source_is_off_with_the_reason_and_the_reference_is_used(
        backend, used_by_device, wrong, dtype, monkeypatch, caplog):
    change_source(monkeypatch, "- 8)", f"- {wrong})")
    fmt, out = FORMATS["Q4_0"], torch.empty(8 * 32, dtype=dtype)
    tensors = random_tensors(fmt, 8, CPU)
    assert kernel_layer.find("dequantize", CPU, fmt, dtype) is None
    assert_same_bits(kernel_layer.dequantize_into(fmt, tensors, out),
                     fmt.dequantize_into(tensors, torch.empty_like(out)))
    assert "dequantize of Q4_0 to" in caplog.text
    assert ("values differ from the reference" if wrong == "7" else wrong) in caplog.text


@pytest.mark.parametrize(("backend", "tokens", "dtype"), [
    *(("cpp", tokens, dtype) for tokens in (1, 4, 40) for dtype in DTYPES[1:]),
    ("cpp", 1025, torch.bfloat16),  # on the other side of what its kernel takes
    *(pytest.param(backend, tokens, torch.float16, marks=pytest.mark.heavy)
      for backend in MAIN[1:3] for tokens in (1, 4, 40))], indirect=["backend"])
@pytest.mark.usefixtures("used_by_device")
def test_a_weak_lora_arrives(tokens, dtype):
    """With a bias, in a dtype whose step is larger than what the LoRA changes."""
    rows, columns, norm = 1024, 64, 0.0005 if dtype == torch.float16 else 0.002
    weight = random_weight("Q8_0", (rows, columns))
    dense = product.dequantize(weight, torch.float32)
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((rows, 4), (4, columns)))
    bias = (torch.randn(rows, generator=generator) * dense.std() * columns**0.5).to(dtype)

    def run(input, strength):
        low_rank = LowRank(down.to(dtype), ((strength * up).to(dtype),), (Slice(0, rows, 0, 4),))
        return product.linear(input, weight, bias, low_rank)

    inputs = [torch.randn(tokens, columns, generator=generator).to(dtype)
              for _ in range(max(1, 96 // tokens))]
    change = up @ down
    base = (dense.norm() / change.norm()).item()
    assert_full_strength(run, inputs, lambda strength: strength * change, (norm,), base)
