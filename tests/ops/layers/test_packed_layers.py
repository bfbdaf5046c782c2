"""The operations class: layers with packed weights compute what dense layers compute, and never
keep a dense weight."""
import concurrent.futures
import gc
import math
import weakref

import pytest
import torch
from comfy.ops import manual_cast
from pack_api import FORMATS, is_packed, packed_operations, product
from patched_layers import KERNELS, PATCHES, input_for, layer_and_twin
from patched_models import packed_anyhow, relative

from featherweight.ops.layers import workspace
from featherweight.ops.layers.load_hooks import dequantize_plain_parameters
from featherweight.ops.tensor.packed_layout import reshape_to

OPERATIONS = packed_operations()
FORMAT_NAMES = ("Q8_0", "Q4_K", "IQ2_XS")


def random_weight(format_name, shape, seed=0):
    """A packed weight and its dense float32 values by gguf's reference."""
    generator = torch.Generator().manual_seed(seed)
    return packed_anyhow(torch.randn(shape, generator=generator), format_name, seed)


def packed_linear(format_name="Q8_0", rows=48, bias=True, dtype=torch.float32):
    """A layer of 512 columns, its dense weight and its bias."""
    weight, dense = random_weight(format_name, (rows, 512))
    layer = OPERATIONS.Linear(512, rows, bias=bias, dtype=dtype)
    biases = {"bias": torch.linspace(-1, 1, rows)} if bias else {}
    layer.load_state_dict({"weight": weight, **biases})
    return layer, dense, biases.get("bias")


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_linear_equals_the_dense_product_of_the_reference_values(format_name):
    layer, dense, bias = packed_linear(format_name)
    for shape in ((512,), (1, 512), (5, 512), (2, 3, 512)):
        input = torch.randn(shape)
        assert relative(layer(input), torch.nn.functional.linear(input, dense, bias)) < 1e-6
    assert is_packed(layer.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_in_half_precision_rounds_each_weight_once(dtype):
    layer, dense, bias = packed_linear("Q4_K", dtype=dtype)
    input = torch.randn(3, 512, dtype=dtype)
    expected = torch.nn.functional.linear(input, dense.to(dtype), bias.to(dtype))
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("by_torch", [True, False], ids=["as on a GPU", "by oneDNN"])
@pytest.mark.parametrize("bias", [True, False])
def test_large_weights_go_through_the_product_in_slices(monkeypatch, bias, by_torch):
    if by_torch:
        monkeypatch.setattr(product.cpu_linear, "takes", lambda input: False)
    layer, dense, bias_values = packed_linear("Q8_0", rows=70, bias=bias)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 16 * 512 * 4)
    taken = []
    take = workspace.Workspace.take
    monkeypatch.setattr(workspace.Workspace, "take",
                        lambda self, shape, dtype: taken.append(shape) or take(self, shape, dtype))
    input = torch.randn(2, 3, 512)
    assert relative(layer(input), torch.nn.functional.linear(input, dense, bias_values)) < 1e-6
    assert taken == [(16, 512)] * 4 + [(6, 512)]


def test_slices_end_between_blocks_where_blocks_cross_rows(monkeypatch):
    weight, dense = random_weight("Q4_K", (64, 320))
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 1)
    input = torch.randn(4, 320)
    assert relative(product.linear(input, weight), torch.nn.functional.linear(input, dense)) < 1e-6


def test_the_workspace_is_reused_and_freed_with_the_last_layer(monkeypatch):
    # models of other tests may still live
    monkeypatch.setattr(workspace, "_workspaces", weakref.WeakValueDictionary())
    layer, *_ = packed_linear()
    with torch.no_grad():
        layer(torch.randn(1, 512))
        buffer = layer._workspace._buffer.data_ptr()
        layer(torch.randn(1, 512))
    assert layer._workspace._buffer.data_ptr() == buffer
    assert layer._workspace._buffer.nbytes <= workspace.CPU_WORKSPACE_BYTES
    assert packed_linear()[0]._workspace is layer._workspace
    del layer
    gc.collect()
    assert not workspace._workspaces


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_embedding_gathers_rows_and_dequantizes_only_those(format_name, monkeypatch):
    weight, dense = random_weight(format_name, (100, 512))
    layer = OPERATIONS.Embedding(100, 512, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    dequantized = []
    packed_format = FORMATS[format_name]
    terms = packed_format.terms
    monkeypatch.setattr(packed_format, "terms",
                        lambda blocks: dequantized.append(len(blocks)) or terms(blocks))
    ids = torch.tensor([[3, 99, 0], [3, 50, 1]])
    assert torch.equal(layer(ids), dense[ids])
    assert sum(dequantized) == ids.numel() * 512 // packed_format.block_length
    assert layer(ids, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_rows_that_a_later_comfyui_looks_up_by_itself_are_those_of_the_packed_table(monkeypatch):
    """It reads `host_rows` of an embedding that stays in memory; functions on the weight are its
    own."""
    weight, dense = random_weight("Q8_0", (100, 512))
    layer = OPERATIONS.Embedding(100, 512, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    monkeypatch.setattr(manual_cast.Embedding, "host_rows", lambda self, ids: "the host's",
                        raising=False)
    ids = torch.tensor([3, 99, 0])
    assert torch.equal(layer.host_rows(ids), dense[ids])
    layer.weight_function = [lambda weight: weight]
    assert layer.host_rows(ids) == "the host's"


def test_embedding_of_rows_that_share_blocks_is_right():
    weight, dense = random_weight("Q4_K", (16, 320))
    layer = OPERATIONS.Embedding(16, 320, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(torch.tensor([0, 15, 7])), dense[[0, 15, 7]])


@pytest.mark.parametrize(("name", "kernel", "input_shape"), [
    ("Conv1d", (3,), (1, 64, 9)), ("Conv2d", (3, 3), (1, 64, 5, 6)),
    ("Conv3d", (1, 2, 2), (1, 64, 3, 4, 4))])
def test_convolutions_dequantize_as_they_run(name, kernel, input_shape):
    weight, dense = random_weight("Q8_0", (32, 64, *kernel))
    layer, twin = (getattr(operations, name)(64, 32, kernel, dtype=torch.float32)
                   for operations in (OPERATIONS, manual_cast))
    layer.load_state_dict({"weight": weight, "bias": torch.ones(32)})
    twin.load_state_dict({"weight": dense, "bias": torch.ones(32)})
    for dtype in (torch.float32, torch.bfloat16):
        input = torch.randn(input_shape, dtype=dtype)
        assert torch.equal(layer(input), twin(input))
    assert is_packed(layer.weight)


def test_construction_allocates_no_weight():
    for layer in (OPERATIONS.Linear(1 << 20, 1 << 20), OPERATIONS.Embedding(1 << 20, 1 << 20),
                  OPERATIONS.Conv2d(1 << 15, 1 << 15,
                                    3), OPERATIONS.conv_nd(3, 1 << 12, 1 << 12, 3)):
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_a_missing_weight_is_zeros_that_take_no_memory():
    layer = OPERATIONS.Linear(512, 256, bias=False, dtype=torch.float32)
    layer.load_state_dict({}, strict=False, assign=True)
    assert layer.weight.untyped_storage().nbytes() <= 4
    assert torch.equal(layer(torch.ones(2, 512)), torch.zeros(2, 256))


def test_missing_unexpected_and_misshaped_tensors_are_reported_as_torch_does():
    layer = OPERATIONS.Linear(64, 8, dtype=torch.float32)
    missing, unexpected = layer.load_state_dict({"bias": torch.zeros(8), "scale": torch.zeros(1)},
                                                strict=False)
    assert missing == ["weight"] and unexpected == ["scale"]
    assert torch.equal(layer.weight, torch.zeros(8, 64))
    with pytest.raises(RuntimeError,
                       match=r"weight has shape \(8, 32\), the model expects \(8, 64\)"):
        layer.load_state_dict({"weight": torch.zeros(8, 32), "bias": torch.zeros(8)})


def test_plain_tensors_take_the_models_dtype_unless_assigned():
    layer = OPERATIONS.Linear(4, 4, dtype=torch.bfloat16)
    state = {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
    layer.load_state_dict(state)
    assert layer.weight.dtype == torch.bfloat16
    layer = OPERATIONS.Linear(4, 4, dtype=torch.bfloat16)
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()


class ModelWithBareParameters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.registers = torch.nn.Parameter(torch.empty(1, 4, 64))
        self.register_buffer("table", torch.empty(2, 64))
        self.proj = OPERATIONS.Linear(64, 64, dtype=torch.float32)


@pytest.mark.parametrize("assign", [False, True])
def test_parameters_a_model_owns_outside_of_layers_are_dequantized_at_load(assign):
    registers, dense_registers = random_weight("Q8_0", (4, 64), 1)
    table, dense_table = random_weight("Q8_0", (2, 64), 2)
    weight, _ = random_weight("Q8_0", (64, 64), 3)
    holder = torch.nn.Module()
    with dequantize_plain_parameters():
        holder.model = ModelWithBareParameters()
        holder.model.load_state_dict(
            {
                "registers": registers, "table": table, "proj.weight": weight,
                "proj.bias": torch.zeros(64)
            }, assign=assign)
    assert not is_packed(holder.model.registers) and is_packed(holder.model.proj.weight)
    assert torch.equal(holder.model.registers, dense_registers.view(1, 4, 64))
    assert torch.equal(holder.model.table, dense_table)
    assert not torch.nn.modules.module._global_module_registration_hooks
    assert not holder.model._load_state_dict_pre_hooks


def test_input_of_another_width_is_refused_with_a_reason():
    layer, *_ = packed_linear()
    with pytest.raises(RuntimeError, match="512 input features was given 768"):
        layer(torch.randn(2, 768))


@pytest.mark.parametrize("options", [{}, {"compute": "int8"}], ids=str)
@pytest.mark.parametrize("plain", [torch.float16, torch.bfloat16], ids=str)
def test_plain_16_bit_weights_keep_their_bytes_and_values_in_float32(plain, options):
    operations = packed_operations(**options)
    for name, sizes, made, input in (
        ("Linear", (512, 768), {"bias": False}, torch.randn(600, 768)),
        ("Conv2d", (32, 16, 3, 3), {"bias": False, "kernel_size": 3}, torch.randn(1, 16, 9, 9)),
        ("Embedding", (64, 96), {}, torch.tensor([[3, 63]]))):
        weight = torch.randn(sizes).to(plain)
        size = sizes if name == "Embedding" else sizes[1::-1]
        layer = getattr(operations, name)(*size, **made, dtype=torch.float32)
        layer.load_state_dict({"weight": weight})
        dense = getattr(manual_cast, name)(*size, **made)
        dense.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        assert layer.weight.dtype == torch.float32 and layer.weight.nbytes == weight.nbytes
        assert layer.weight._qdata.data_ptr() == weight.data_ptr()
        assert torch.equal(layer(input), dense(input))


def test_a_convolution_of_16_bit_weights_has_its_gradient():
    layer = OPERATIONS.Conv2d(16, 32, 3, bias=False, dtype=torch.float32)
    input = torch.randn(1, 16, 9, 9, requires_grad=True)
    weight = torch.randn(32, 16, 3, 3).half()
    layer.load_state_dict({"weight": weight})
    layer(input).sum().backward()
    other = input.detach().clone().requires_grad_()
    torch.nn.functional.conv2d(other, weight.float()).sum().backward()
    assert torch.equal(input.grad, other.grad)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_weights_are_held_as_they_are_and_used_where_they_lie(stored, dtype, assign):
    layer = OPERATIONS.Linear(64, 8, bias=False, dtype=dtype)
    weight = torch.randn(8, 64).to(stored)
    layer.load_state_dict({"weight": weight}, assign=assign)
    assert is_packed(layer.weight) and layer.weight.dtype == (stored if assign else dtype)
    assert layer.weight.nbytes == weight.nbytes
    input = torch.randn(3, 64).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(input), torch.nn.functional.linear(input, weight.to(dtype)))
    if stored == dtype:
        assert product.plain_values(layer.weight, dtype).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", [None, *PATCHES])
@pytest.mark.parametrize("name", KERNELS)
def test_an_empty_batch_gives_an_empty_output(name, kind, gradient):
    layer, twin = layer_and_twin(name, "Q8_0", kind, torch.float32)
    input = input_for(name)[:0]
    for empty in (input, input.expand(2, *input.shape)) if name == "Linear" else (input,):
        assert layer(empty.detach().requires_grad_(gradient)).shape == twin(empty).shape


def test_what_another_thread_builds_meanwhile_takes_no_other_shapes():
    def load_elsewhere():
        torch.nn.Sequential(torch.nn.Linear(4, 1)).load_state_dict(
            {"0.weight": torch.ones(4), "0.bias": torch.ones(1)})

    with concurrent.futures.ThreadPoolExecutor(1) as pool, dequantize_plain_parameters():
        with pytest.raises(RuntimeError, match="size mismatch for 0.weight"):
            pool.submit(load_elsewhere).result()


@pytest.mark.parametrize(("stored", "shape"), [
    ((6, 2, 2), (3, 2, 2, 2)), ((3, 2, 2, 2), (6, 2, 2)), ((4, 8), (1, 4, 8)), ((1, 4, 8), (4, 8)),
    ((4, 1, 8), (4, 8, 1)), ((12, 4, 5), (3, 4, 2, 2, 5)), ((24, 5), (2, 3, 4, 5))])
def test_merged_and_split_dimensions_are_the_models(stored, shape):
    values = torch.arange(math.prod(stored)).view(stored)
    assert torch.equal(reshape_to(values, torch.Size(shape)), values.view(shape))


@pytest.mark.parametrize(("stored", "shape"), [
    ((8, 4), (4, 8)), ((32,), (4, 8)), ((4, 8), (32,)), ((2, 6), (3, 4)), ((4, 9), (2, 2, 8)),
    ((0, 4), (2, 0, 4)), ((4, 4), (2, 2, 2, 3))])
def test_other_shapes_stay_what_they_are(stored, shape):
    assert reshape_to(torch.zeros(stored), torch.Size(shape)).shape == stored


@pytest.mark.parametrize("options", [{}, {"mixed": True}], ids=str)
def test_models_loaded_alike_have_layers_of_the_same_classes(options):
    first, second = packed_operations(**options), packed_operations(**options)
    assert first.Linear is second.Linear and first.Conv2d is second.Conv2d
    assert first.Linear is not packed_operations(compute="int8", **options).Linear
