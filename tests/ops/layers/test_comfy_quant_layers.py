"""Layers in the host's own quantised formats: its product, our patches."""
import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS
from host_formats import HOST_FORMATS, TABLE_FORMATS, in_host_format
from host_patches import patched_by_host
from pack_api import packed_operations
from patched_layers import PATCHES, patches_for, plain_lora, with_patches
from patched_models import relative

from featherweight.ops.patcher import adopt

OPERATIONS = packed_operations(mixed=True)
ROWS, COLUMNS = 128, 256
product = torch.nn.functional.linear

pytestmark = pytest.mark.usefixtures("fixed_seed", "no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def layers(format_name: str, dtype=torch.float32, smoothing=None, **config):
    """(our layer, the host's own of the same bytes, the dense float32 weight)"""
    generator = torch.Generator().manual_seed(0)
    parts, values = in_host_format("weight",
                                   torch.randn(ROWS, COLUMNS, generator=generator) / 16,
                                   format_name, **config)
    parts["bias"] = torch.linspace(-1, 1, ROWS).to(dtype)
    if smoothing is not None:
        if "pre_quant_scale" not in QUANT_ALGOS[format_name]["parameters"]:
            pytest.skip("this ComfyUI does not smooth the input of a layer")
        parts["pre_quant_scale"], values = smoothing, values * smoothing
    made = [operations.Linear(COLUMNS, ROWS, dtype=dtype)
            for operations in (OPERATIONS, host_operations(dtype))]
    for layer in made:
        layer.load_state_dict({name: value.clone() for name, value in parts.items()})
    return *made, values


def host_operations(dtype):
    return comfy.ops.mixed_precision_ops({"mixed_ops": True}, dtype, disabled=OPERATIONS._disabled)


@pytest.mark.parametrize("shape", [(COLUMNS,), (3, COLUMNS), (2, 5, COLUMNS)])
@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_without_patches_it_is_the_hosts_layer(format_name, shape):
    ours, host, _ = layers(format_name)
    input = torch.randn(shape)
    assert relative(ours(input), host(input)) < 1e-6


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_a_lora_adds_its_product_to_the_hosts(format_name):
    ours, host, values = layers(format_name)
    with_patches(ours, patches := patches_for("lora", values))
    codes, input = ours.weight._qdata.clone(), torch.randn(2, 5, COLUMNS)
    added = ours(input) - host(input)
    assert relative(added, product(input, patched_by_host(patches, values) - values)) < 1e-5
    assert torch.equal(ours.weight._qdata, codes)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_patches_that_change_the_weight_run_in_float(format_name, dtype, limit):
    ours, _, values = layers(format_name, dtype)
    with_patches(ours, patches := patches_for("diff and lora", values), dtype)
    codes, input = ours.weight._qdata.clone(), torch.randn(2, 5, COLUMNS)
    expected = product(input, patched_by_host(patches, values), ours.bias.float())
    assert relative(ours(input.to(dtype)).float(), expected) < limit
    assert torch.equal(ours.weight._qdata, codes)


@pytest.mark.parametrize("given", ["quantised", "dense"])
@pytest.mark.parametrize("kind", PATCHES)
def test_smoothing_of_the_input_is_not_smoothing_of_the_patch(kind, given):
    ours, host, values = layers("nvfp4", smoothing=torch.linspace(0.5, 2, COLUMNS))
    input = torch.randn(3, COLUMNS)
    if given == "dense":
        # a layer of dynamic VRAM, which the host casts for the CPU by dequantising it
        ours._v = object()
    assert relative(ours(input), host(input)) < 1e-6
    with_patches(ours, patches := patches_for(kind, values))
    expected = product(input, patched_by_host(patches, values), ours.bias)
    assert relative(ours(input), expected) < 1e-6


def test_a_wrapper_of_a_smoothed_weight_runs_as_in_the_host():
    ours, host, _ = layers("nvfp4", smoothing=torch.linspace(0.5, 2, COLUMNS))
    input = torch.randn(3, COLUMNS)
    for layer in (ours, host):
        layer.weight_function = [torch.relu]
    assert torch.equal(ours(input), host(input))


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_a_wrapped_weight_takes_patches(format_name, kind):
    ours, _, values = layers(format_name)
    with_patches(ours, patches := patches_for(kind, values))
    input = torch.randn(3, COLUMNS)
    ours.weight_function = [lambda weight: weight]
    expected = product(input, patched_by_host(patches, values), ours.bias)
    assert relative(ours(input), expected) < 1e-2


def test_a_file_that_asks_for_the_float_product_of_int8_gets_it():
    ours, host, values = layers("int8_tensorwise", full_precision_matrix_mult=True)
    input = torch.randn(3, COLUMNS)
    expected = product(input, values, ours.bias)
    assert relative(ours(input), expected) < 1e-6 < 1e-3 < relative(host(input), expected)
    with_patches(ours, patches := patches_for("lora", values))
    expected = product(input, patched_by_host(patches, values), ours.bias)
    assert relative(ours(input), expected) < 1e-6


@pytest.mark.parametrize("format_name", HOST_FORMATS)
def test_a_weight_the_host_patches_stays_dense(format_name):
    ours, _, values = layers(format_name)
    dense = ours.convert_weight(ours.weight)
    assert torch.equal(dense, values)
    ours.set_weight(dense + 1e-4)
    input = torch.randn(3, COLUMNS)
    assert relative(ours(input), product(input, values + 1e-4, ours.bias)) < 1e-6


# --- tables of embeddings ---


def tables(format_name: str, dtype=torch.float32, seed: int = 0):
    """(our embedding, the host's own of the same bytes, the dense float32 values)"""
    generator = torch.Generator().manual_seed(seed)
    parts, values = in_host_format("weight",
                                   torch.randn(ROWS, COLUMNS, generator=generator) / 16,
                                   format_name)
    made = [operations.Embedding(ROWS, COLUMNS, dtype=dtype)
            for operations in (OPERATIONS, host_operations(dtype))]
    for table in made:
        table.load_state_dict({name: value.clone() for name, value in parts.items()})
    return *made, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format_name", TABLE_FORMATS)
def test_rows_of_a_table_are_the_hosts_in_the_dtype_of_the_layer(format_name, dtype):
    ours, host, _ = tables(format_name, dtype)
    ids = torch.tensor([[3, 0], [ROWS - 1, 3]])
    assert ours(ids).dtype == dtype and torch.equal(ours(ids), host(ids))
    assert torch.equal(ours(ids, out_dtype=torch.float16), host(ids, out_dtype=torch.float16))


class WithTable(torch.nn.Module):
    device = None

    def __init__(self, table):
        super().__init__()
        self.table = table

    def get_dtype_inference(self):
        return torch.float32


def table_patcher(format_name: str, seed: int = 0):
    """(a patcher of a model with a table, its values)"""
    ours, _, values = tables(format_name, seed=seed)
    return adopt(ModelPatcher(WithTable(ours), torch.device("cpu"), torch.device("cpu"))), values


def lora_on_table(patcher):
    """(a clone with a LoRA on its table, what that adds to the values)"""
    lora, patcher = plain_lora(ROWS, COLUMNS, spread=1 / 8), patcher.clone()
    assert patcher.add_patches({"table.weight": lora}, 0.7)
    return patcher, 0.7 * lora.weights[0] @ lora.weights[1]


def merged_tables(patcher, format_name):
    """(a clone with the mean of its table and another one, what that adds to the values)"""
    (other, values), patcher = table_patcher(format_name, seed=1), patcher.clone()
    before = table_patcher(format_name)[1]
    patcher.add_patches(other.get_key_patches("table"), 0.5, 0.5)
    return patcher, (values - before) / 2


@pytest.mark.parametrize("kind", ["lora", "merge"])
@pytest.mark.parametrize("format_name", TABLE_FORMATS)
def test_patches_on_a_table_run_are_read_and_are_saved(format_name, kind):
    plain, values = table_patcher(format_name)
    patcher, change = lora_on_table(plain) if kind == "lora" else merged_tables(plain, format_name)
    codes, ids = plain.model.table.weight._qdata.clone(), torch.arange(ROWS)
    comfy.model_management.load_models_gpu([patcher])
    ran, read = patcher.model.table(ids), dict(patcher.model_state_dict().items())["table.weight"]
    saved = patcher.model_state_dict_for_saving()["table.weight"].to("cpu")
    for found in (ran, read, saved):
        assert relative(found - values, change) < 1e-6
    comfy.model_management.load_models_gpu([plain])
    assert torch.equal(plain.model.table(ids), values)
    assert torch.equal(plain.model.table.weight._qdata, codes)
    assert torch.equal(dict(plain.model_state_dict().items())["table.weight"], values)
    assert plain.model_state_dict_for_saving()["table.weight"].dtype == codes.dtype
    comfy.model_management.unload_all_models()
