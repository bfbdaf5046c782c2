"""A LoRA has its full strength: in every dtype, for any number of rows, however weak, on every kind
of layer and format."""
import functools
import math

from devtools.measure.weights import random_weight

import comfy.lora
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.weight_adapter import BOFTAdapter, LoRAAdapter, OFTAdapter
from host_formats import TABLE_FORMATS, in_host_format
from host_patches import patched_by_host
from lora_gain import NORMS, OUTPUTS, Gain, assert_full_strength
from patched_models import (
    adapter,
    flux_file,
    forget_models,
    lora_for,
    packed_flux,
    patched,
    run,
    tiny_flux,
)

from devtools.files.gguf_files import write_gguf
from featherweight.loaders.files.open_weights import open_weights
from featherweight.ops.formats.base import FORMATS
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.kernels.validation import random_tensors
from featherweight.ops.layers import int8
from featherweight.ops.layers.comfyui_operations import operations_for, packed_operations
from featherweight.ops.layers.rounded_sum import add_small
from featherweight.ops.low_rank import LowRank
from featherweight.ops.patcher import adopt
from featherweight.ops.patches.layer_patches import build_patches
from featherweight.ops.stochastic_rounding import stochastic_round
from featherweight.ops.tensor.packed_layout import QuantizedTensor, packed_tensor, relabel

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WEAK, WEAKEST = (NORMS[0], NORMS[2]), NORMS[:1]
ROWS = (1, 16, 256, 1024, 1537, 4096, 16384)
# a scale in the block, with a minimum, on the grid of bfloat16, apart from it, a row's, and none
EACH_WAY = ("Q8_0", "Q4_K", "MXFP4", "NF4", "INT8", "BF16")
GGML = [name for name, packed_format in FORMATS.items() if packed_format.ggml_type is not None]

pytestmark = pytest.mark.usefixtures("small_models", "fixed_seed")


@pytest.fixture(autouse=True, scope="module")
def no_model_outlives_its_tests():
    yield
    flux.cache_clear()
    forget_models()


def layer_of(weight, dtype, kind: str = "Linear", bias: bool = True, compute: str = "exact"):
    """A layer that holds `weight`, packed or not, with a bias about as large as what its product
    gives."""
    layers = packed_operations(compute=compute)
    rows, columns, *kernel = weight.shape
    layer = getattr(layers, kind)(columns, rows, *([tuple(kernel)] if kernel else []), bias=bias,
                                  dtype=dtype)
    parts = {"weight": weight}
    if bias:
        spread = values_of(weight).std() * weight[0].numel() ** 0.5
        parts["bias"] = (torch.randn(rows) * spread).to(dtype)
    layer.load_state_dict(parts)
    return layer


def values_of(weight) -> torch.Tensor:
    """In float32, of a weight that is packed, in a format of the host, or dense."""
    return (
        relabel(weight, torch.float32).dequantize()
        if isinstance(weight, QuantizedTensor)
        else weight.float()
    )


def even_weight(format_name: str, shape: tuple[int, int]):
    """A packed weight of random blocks of about the same size, so that no few of them make the
    output."""
    packed_format = INT8.of_columns(shape[1]) if format_name == "INT8" else FORMATS[format_name]
    count = math.prod(shape) // packed_format.block_length
    if packed_format.qparams:
        data, _ = random_tensors(packed_format, count, CPU)
        return packed_tensor(packed_format, data, shape, torch.float32,
                             torch.rand(count) / 100 + 0.01)
    pool = torch.randint(0, 256, (1 << 15, packed_format.block_bytes), dtype=torch.uint8)
    peaks = packed_format.dequantize(pool).abs().amax(-1)
    pool = pool[(peaks > 0.03) & (peaks < 0.3)]  # NaN compares false
    return packed_tensor(packed_format, pool[torch.randint(0, len(pool), (count,))], shape)


def plain_lora(rows: int, columns: int, rank: int = 4):
    return LoRAAdapter(
        set(), (torch.randn(rows, rank), torch.randn(rank, columns), None, None, None, None))


def with_patch(layer, value):
    """(run, weight_change, base) for `assert_full_strength`, of an adapter at the strength that
    they are given."""
    dense = values_of(layer.weight)

    def hosts(strength):
        # turn the weight, which goes with the square of the strength
        if isinstance(value, (OFTAdapter, BOFTAdapter)):
            return [(1.0, type(value)(set(), (value.weights[0] * strength, *value.weights[1:])),
                     1.0, None, None)]
        return [(strength, value, 1.0, None, None)]

    def run(input, strength):
        layer.lora = build_patches("w", hosts(strength), dense.shape, CPU, input.dtype,
                                   layer.has_branch)
        with torch.no_grad():
            return layer(input)

    def weight_change(strength):
        return patched_by_host(hosts(strength), dense) - dense

    return run, weight_change, (dense.norm() / weight_change(1).norm()).item()


def assert_layer_at_full_strength(layer, value, rows: int, dtype, norms=NORMS,
                                  outputs: int | None = None):
    run, weight_change, base = with_patch(layer, value)
    outputs = outputs or OUTPUTS[dtype]
    draws = max(1, outputs // (rows * layer.weight.shape[0]))
    inputs = [torch.randn(rows, layer.weight.shape[1]).to(dtype) for _ in range(draws)]
    assert_full_strength(run, inputs, weight_change, norms, base)


def assert_plain_lora_at_full_strength(dense: torch.Tensor, rows: int, run):
    """run(patches, input) -> output of a layer of these values that runs `patches`."""
    value = plain_lora(*dense.shape)
    change = value.weights[0] @ value.weights[1]

    def at_strength(input, strength):
        return run(
            build_patches("w", [(strength, value, 1.0, None, None)], dense.shape, CPU, input.dtype),
            input)

    inputs = [torch.randn(rows, dense.shape[1], dtype=torch.bfloat16)]
    base = (dense.norm() / change.norm()).item()
    assert_full_strength(at_strength, inputs, lambda strength: strength * change, WEAK, base)


# --- rows, dtypes, formats ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [
    rows if rows in (1, 256, 1537) else pytest.param(rows, marks=pytest.mark.heavy)
    for rows in ROWS])
def test_at_any_number_of_rows(rows, dtype):
    wide = max(64, min(16384, OUTPUTS[dtype] // rows // 2))
    layer = layer_of(random_weight("Q8_0", (wide, 32)), dtype)
    assert_layer_at_full_strength(layer, plain_lora(wide, 32), rows, dtype)


@pytest.mark.parametrize(("format_name", "rows"), [
    pytest.param(name, rows, marks=() if name in EACH_WAY and (
        rows == 4096 or name in ("MXFP4", "INT8")) else pytest.mark.heavy)
    for name in (*GGML, "NF4", "FP4", "INT8") for rows in (256, 4096)])
def test_on_every_format(format_name, rows):
    """The LoRA is added to the product, whatever the weight is packed to."""
    shape = 2048, 256
    layer = layer_of(even_weight(format_name, shape), torch.bfloat16)
    assert_layer_at_full_strength(layer, plain_lora(*shape), rows, torch.bfloat16, WEAKEST)


@pytest.mark.parametrize(("dtype", "stored"), [
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16), *(
        pytest.param(dtype, stored, marks=pytest.mark.heavy) for dtype, stored in (
            (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)))], ids=str)
def test_on_dense_layers_of_a_packed_model(dtype, stored):
    layer = layer_of(torch.randn(2048, 256).to(stored) / 16, dtype)
    assert_layer_at_full_strength(layer, plain_lora(2048, 256), 4096, dtype, WEAKEST)


# --- several at once ---


def test_each_of_four_loras_beside_stronger_ones():
    layer = layer_of(random_weight("Q4_K", (2048, 256)), torch.bfloat16)
    strong = [(share, plain_lora(2048, 256)) for share in (0.05, -0.03, 0.01)]
    weak = plain_lora(2048, 256)
    dense = values_of(layer.weight)

    def run(input, strength):
        patches = [(share * (dense.norm() / 1450).item(), value, 1.0, None, None)
                   for share, value in strong]
        patches.insert(2, (strength, weak, 1.0, None, None))
        layer.lora = build_patches("w", patches, dense.shape, CPU, input.dtype)
        with torch.no_grad():
            return layer(input)

    change = weak.weights[0] @ weak.weights[1]
    inputs = [torch.randn(4096, 256, dtype=torch.bfloat16)]
    assert_full_strength(run, inputs, lambda strength: strength * change, WEAK,
                         (dense.norm() / change.norm()).item())


def test_a_weak_lora_on_a_slice_beside_a_strong_one_on_the_whole():
    """As where one file has q, k and v apart and another has them in one."""
    layer = layer_of(random_weight("Q4_K", (3072, 256)), torch.bfloat16)
    whole, part, dense = plain_lora(3072, 256), plain_lora(1024, 256), values_of(layer.weight)
    half = (dense.norm() / (whole.weights[0] @ whole.weights[1]).norm()).item() / 2

    def run(input, strength):
        patches = [(half, whole, 1.0, None, None), (strength, part, 1.0, (0, 1024, 1024), None)]
        layer.lora = build_patches("w", patches, dense.shape, CPU, input.dtype)
        with torch.no_grad():
            return layer(input)[:, 1024:2048]

    change = part.weights[0] @ part.weights[1]
    inputs = [torch.randn(4096, 256, dtype=torch.bfloat16) for _ in range(2)]
    assert_full_strength(run, inputs, lambda strength: strength * change, WEAK,
                         (dense[:1024].norm() / change.norm()).item())


# --- factors out of balance ---


def out_of_balance(times: float, rows: int, columns: int, rank: int = 4):
    """The same product; some trainers leave one factor that many times larger than the other. Each
    rank has its own share."""
    up, down, *others = plain_lora(rows, columns, rank).weights
    each = torch.logspace(0, 1, rank).sub(1).div(9) * (times - 1) + 1
    return LoRAAdapter(set(), (up / each, down * each[:, None], *others))


def merged(layer):
    """The layer as it runs beside functions on its weight, which take the weight with the LoRA in
    it."""
    forward = layer.forward

    def run(input):
        layer.weight_function, layer.lora = [layer.lora, lambda weight: weight], None
        try:
            return forward(input)
        finally:
            layer.weight_function = []

    layer.forward = run
    return layer


@pytest.mark.parametrize(
    "way", [lambda layer: layer, merged], ids=["beside the product", "in the weight"])
@pytest.mark.parametrize(("times", "dtype"), [
    (1e-5, torch.float16), (1e5, torch.float16), (1e5, torch.bfloat16)], ids=str)
def test_of_factors_that_are_out_of_balance(times, dtype, way):
    layer = way(layer_of(random_weight("Q8_0", (1024, 512)), dtype))
    assert_layer_at_full_strength(layer, out_of_balance(times, 1024, 512), 1024, dtype, WEAK,
                                  OUTPUTS[dtype])


@pytest.mark.parametrize("times", [1e-5, 1e5])
def test_of_factors_that_are_out_of_balance_on_a_convolution(times):
    shape = 256, 64, 3, 3
    layer = layer_of(relabel(random_weight("Q8_0", (256, 64 * 9)), shape=shape), torch.float16,
                     "Conv2d")
    value = out_of_balance(times, 256, 64 * 9)
    up, down, *others = value.weights
    value = LoRAAdapter(set(), (up[..., None, None], down.view(4, *shape[1:]), *others))
    run, weight_change, base = with_patch(layer, value)
    gain, exact, input = Gain(), weight_change(base / 100), torch.randn(4, 64, 24, 24).half()
    gain.add(
        run(input, base / 100).double() - run(input, 0.0).double(),
        torch.nn.functional.conv2d(input.float(), exact))
    gain.assert_full(f"{times} times")


def test_balancing_changes_no_product():
    up, down = (
        torch.randn(96, 5) * torch.logspace(-20, 20, 5),
        torch.randn(5, 64) * torch.logspace(15, -30, 5)[:, None],
    )
    up[:, 1], down[3] = 0, 0
    both = LowRank.from_factors([(up, down, (0, 96))], 96, torch.float32)
    (_, of_rows), = both.parts()
    for rank in range(5):
        assert torch.equal(of_rows[:, rank, None].double() @ both.down[rank, None].double(),
                           up[:, rank, None].double() @ down[rank, None].double())
    assert both.down.isfinite().all() and of_rows.isfinite().all()
    peaks = of_rows.abs().amax(0) / both.down.abs().amax(1)
    assert ((peaks[[0, 2, 4]] > 0.2) & (peaks[[0, 2, 4]] < 5)).all()


# --- what changes the weight itself ---


@pytest.mark.parametrize(("kind", "format_name", "dtype"), [
    ("dora", "MXFP4", torch.bfloat16), ("dora", "MXFP4", torch.float16),
    ("dora", None, torch.bfloat16), ("lokr", "Q4_K", torch.float32),
    *(pytest.param(*case, marks=pytest.mark.heavy) for case in (
        ("lokr", "MXFP4", torch.bfloat16), ("oft", "MXFP4", torch.bfloat16),
        ("diff", "MXFP4", torch.bfloat16),
        ("loha", "MXFP4", torch.bfloat16), ("boft", "MXFP4", torch.bfloat16),
        ("glora", "MXFP4", torch.bfloat16), ("dora", "Q8_0", torch.bfloat16),
        ("lokr", "NF4", torch.bfloat16), ("loha", None, torch.float16)))])
def test_of_every_kind_on_the_weight_side(kind, format_name, dtype):
    """MXFP4's values, and those of a 16-bit weight, lie on the grid of bfloat16, where rounding
    loses what is weak."""
    shape = 4096, 1024
    weight = (
        random_weight(format_name, shape) if format_name else torch.randn(shape, dtype=dtype) / 16
    )
    layer = layer_of(weight, dtype)
    lora = {
        f"x.{suffix}": tensor
        for suffix, tensor in adapter(kind, values_of(weight), 1, size=0.05).items()
    }
    value = comfy.lora.load_lora(lora, {"x": "w"})["w"]
    rows = 2048 if dtype == torch.bfloat16 else 64
    assert_layer_at_full_strength(layer, value, rows, dtype, WEAK)


# --- other layers ---


@pytest.mark.parametrize(("name", "kernel", "size", "kind"), [
    ("Conv1d", (3,), (512,), "lora"), ("Conv2d", (3, 3), (24, 24), "lora"),
    ("Conv2d", (3, 3), (8, 8), "lora"), ("Conv2d", (1, 1), (24, 24), "lora"),
    ("Conv3d", (1, 3, 3), (2, 16, 16), "lora"), ("Conv2d", (3, 3), (24, 24), "dora"),
    ("Conv2d", (3, 3), (24, 24), "lokr")])
def test_on_convolutions(name, kernel, size, kind):
    weight = random_weight("Q8_0", (512, 64 * torch.Size(kernel).numel()))
    dense = values_of(weight).view(512, 64, *kernel)
    weight = relabel(weight, shape=dense.shape)
    layer = layer_of(weight, torch.bfloat16, name)
    lora = {f"x.{suffix}": tensor for suffix, tensor in adapter(kind, dense, 1, size=0.05).items()}
    run, weight_change, base = with_patch(layer, comfy.lora.load_lora(lora, {"x": "w"})["w"])
    # the rounding of a weight this small averages out no further
    norm, gain = 0.003 if kind == "lora" else 0.01, Gain()
    exact = weight_change(norm * base) - weight_change(-norm * base)
    convolve = getattr(torch.nn.functional, name.lower())
    for _ in range(max(1, 4608 // math.prod(size))):
        input = torch.randn(1, 64, *size, dtype=torch.bfloat16)
        gain.add(
            run(input, norm * base).double() - run(input, -norm * base).double(),
            convolve(input.float(), exact))
    gain.assert_full(f"a norm of {norm:.2%}")


@pytest.mark.parametrize(
    ("kind", "format_name"),
    [
        *(("lora", name) for name in ("MXFP4", *TABLE_FORMATS)),
        ("lokr", "MXFP4"),
        ("lokr", "float8_e4m3fn"),
    ],
)
def test_on_embeddings(kind, format_name):
    shape, hosts = (4096, 1024), format_name in TABLE_FORMATS
    layer = packed_operations(mixed=hosts).Embedding(*shape, dtype=torch.bfloat16)
    layer.load_state_dict(in_host_format("weight", torch.randn(shape) / 16, format_name)[0] if hosts
                          else {"weight": random_weight(format_name, shape)})
    lora = {
        f"x.{suffix}": tensor
        for suffix, tensor in adapter(kind, values_of(layer.weight), 1, size=0.05).items()
    }
    run, weight_change, base = with_patch(layer, comfy.lora.load_lora(lora, {"x": "w"})["w"])
    for norm in WEAK:
        gain = Gain()
        gain.add(
            run(torch.arange(4096), norm * base).double() -
            run(torch.arange(4096), -norm * base).double(),
            weight_change(norm * base) - weight_change(-norm * base))
        gain.assert_full(f"a norm of {norm:.2%}")


def test_on_experts():
    experts, rows, columns = 4, 1024, 1024
    weight = relabel(random_weight("MXFP4", (experts * rows, columns)),
                        shape=(experts, rows, columns))
    layer = packed_operations().MoEExperts(experts, columns, rows, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    change = torch.randn(experts, rows, columns)
    base = (values_of(weight).norm() / change.norm()).item()
    for norm in WEAK:
        gain, input = Gain(), torch.randn(2048, columns, dtype=torch.bfloat16)
        outputs = []
        for strength in (norm * base, -norm * base):
            patch = (strength, (change,), 1.0, None, None)
            layer.lora = build_patches("w", [patch], weight.shape, CPU, torch.bfloat16,
                                       layer.has_branch)
            with layer.bank_resident(input) as bank, torch.no_grad():
                outputs.append(
                    torch.stack([bank.expert_linear(input, expert) for expert in range(experts)]))
        gain.add(outputs[0].double() - outputs[1].double(),
                 2 * norm * base * (input.float() @ change.transpose(1, 2)))
        gain.assert_full(f"a norm of {norm:.2%}")


# --- other ways to the product ---


@pytest.mark.skipif(not int8.multiplies_integers(CPU), reason="this CPU has no int8 products")
@pytest.mark.parametrize("rows", [4, 4096])  # the first is exact, the second in whole numbers
@pytest.mark.parametrize("bias", [True, False])
def test_with_compute_int8(rows, bias):
    layer = layer_of(random_weight("Q8_0", (2048, 256)), torch.bfloat16, bias=bias, compute="int8")
    few = rows < 128
    norms, outputs = ((0.003,), 1 << 18) if few else (WEAK, None)
    assert_layer_at_full_strength(layer, plain_lora(2048, 256), rows, torch.bfloat16, norms,
                                  outputs)


@pytest.mark.parametrize("way", ["compiled", "with gradients"])
def test_by_torch_compile_and_where_gradients_are_asked_for(way):
    layer = layer_of(random_weight("Q8_0", (2048, 256)), torch.bfloat16)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer

    def run(patches, input):
        layer.lora = patches
        with torch.set_grad_enabled(way == "with gradients"):
            return call(input.clone().requires_grad_(way == "with gradients")).detach()

    assert_plain_lora_at_full_strength(values_of(layer.weight), 4096, run)


@pytest.mark.parametrize("format_name", ["MXFP4", "BF16"])
def test_in_what_nodes_read_and_save(format_name, tmp_path):
    """The values of both formats lie on the grid of bfloat16, in which the model's state dict has
    them."""
    weights = {name: values.numpy() for name, values in tiny_flux().items()}
    path = tmp_path / "flux.gguf"
    write_gguf(path, weights, lambda name, values: format_name if values.ndim > 1 else "F32")
    key = "single_blocks.0.linear1.weight"
    state_dict = open_weights(path).state_dict()
    options = {"custom_operations": operations_for(state_dict), "dtype": torch.bfloat16}
    patcher = adopt(comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options))
    before = patcher.model_state_dict()[f"diffusion_model.{key}"]
    lora = {f"diffusion_model.{key.removesuffix('weight')}{name}": tensor
            for name, tensor in adapter("lora", before.float(), 1, size=NORMS[2]).items()}
    change = lora[f"diffusion_model.{key.removesuffix('weight')}lora_up.weight"] @ (
        lora[f"diffusion_model.{key.removesuffix('weight')}lora_down.weight"]) / 2
    after = patched(patcher, (lora, 1.0)).model_state_dict()[f"diffusion_model.{key}"]
    assert before.dtype == after.dtype == torch.bfloat16
    gain = Gain()
    gain.add(after.double() - before.double(), change)
    gain.assert_full(f"{(change.norm() / before.float().norm()).item():.2%}")


# --- the rounding itself ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dithered_values_are_neighbours_and_right_on_average(dtype):
    values = torch.randn(1 << 23)
    rounded = stochastic_round(values.clone(), dtype).float()
    steps = (
        torch.finfo(dtype).eps * values.abs()
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    assert ((rounded - values).abs() <= steps).all() and torch.equal(
        stochastic_round(values.clone(), dtype).float(), rounded
    )
    assert abs((rounded - values).mean() / steps.mean()) < 2e-3
    grid = values.to(dtype).float()
    # of a step that is added to values on the grid
    for share, allowed in ((0.01, 0.02), (0.1, 0.008), (0.4, 0.003)):
        change = share * torch.finfo(dtype).eps / 2 * grid * torch.rand(values.shape)
        moved = stochastic_round(grid + change, dtype).float() - grid
        assert abs((moved * change).sum() / change.square().sum() - 1) < allowed


def floats(first: int, last: int) -> torch.Tensor:
    """All float32 numbers with these bits and those between, and the same with the other sign."""
    bits = torch.arange(first, last + 1, dtype=torch.int64)
    return torch.cat([bits, bits - (1 << 31)]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dithering_keeps_each_number_of_the_dtype_and_nan_of_any_bits(dtype):
    """CUDA writes NaN as 0x7FFFFFFF, and as 0x7FFF in 16 bits."""
    held = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded, number = stochastic_round(held.float(), dtype), ~held.isnan()
    # the sign of zero too
    assert torch.equal(rounded.view(torch.int16)[number], held.view(torch.int16)[number])
    assert rounded[~number].isnan().all()
    assert add_small(held[~number], torch.tensor(0.1)).isnan().all()
    assert torch.equal(add_small(held[number], torch.tensor(0.0)), held[number])
    for first in (0x7F800001, 0x7FC00000 - 5000, 0x7FFFFFFF - 70000):
        assert stochastic_round(floats(first, first + 70000), dtype).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "first", "largest", "last"),
    [
        (torch.float16, 0x477FB000, 0x477FE000, 0x47802000),
        (torch.bfloat16, 0x7F7E0000, 0x7F7F0000, 0x7F800000),
    ],
    ids=str,
)
def test_dithering_rounds_what_is_above_the_largest_number_to_the_nearest(
    dtype, first, largest, last
):
    # of float16, 65504 to 65600; all that float32 has of bfloat16, and infinity
    above = floats(largest, last)
    assert torch.equal(stochastic_round(above.clone(), dtype), above.to(dtype))
    below = floats(first, largest)
    rounded = stochastic_round(below.clone(), dtype).float()
    assert (
        rounded.isfinite().all()
        and ((rounded - below).abs() < torch.finfo(dtype).eps * below.abs()).all()
    )


def test_dithering_keeps_the_mean_of_numbers_that_are_subnormal_in_float16():
    step = 2.0 ** -24
    for size in (1e-3, 0.02, 0.3, 1.0, 7.7, 300.0, 1000.0):
        values = step * size * (0.5 + torch.rand(1 << 20))
        for signed in (values, -values):
            rounded = stochastic_round(signed.clone(), torch.float16).float()
            assert ((rounded - signed).abs() < step).all()
            spread = min(size, 0.5) ** 0.5 / (1 << 10)  # of the mean of so many, in steps
            assert abs((rounded - signed).mean() / step) < 5 * spread + 1e-4, size
    grid = step * torch.randint(-1023, 1024, (1 << 20,))
    change = step * 0.05 * torch.rand(grid.shape)
    moved = stochastic_round(grid + change, torch.float16).float() - grid
    assert abs((moved * change).sum() / change.square().sum() - 1) < 0.03


@pytest.mark.parametrize(("dtype", "dropped"), [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
def test_the_choice_is_made_by_knuths_hash_of_the_values_own_bits(dtype, dropped):
    """So the same file is written on every machine and by every version."""
    values = torch.randn(1 << 20)
    values = values[values.abs() > 2.0 ** -14]
    bits = values.view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    chance = (bits * 2654435769 & 0xFFFFFFFF) >> 32 - dropped
    expected = torch.from_numpy(
        (bits + chance >> dropped << dropped).astype(np.uint32).view(np.float32))
    for rounded in (
        stochastic_round(values.clone(), dtype),
        stochastic_round(values[:-1].clone().view(-1, 1).t(), dtype).flatten(),
    ):
        assert torch.equal(rounded.float(), expected[:len(rounded)])


# --- a whole step ---


@functools.cache
def flux(dtype):
    patcher = packed_flux("Q8_0")
    patcher.set_model_compute_dtype(dtype)
    return patcher


@functools.cache
def effect(size: int, norm: float, dtype, seed: int) -> torch.Tensor:
    """What a LoRA of a norm, on every matrix, changes in a step with a picture of `size` pixels;
    from minus to plus.

    Each step has a LoRA and a time of its own: what is rounded once for all tokens, the modulation,
    averages out no other way.
    """
    lora = lora_for(flux_file("Q8_0")[1], seed=seed, size=norm)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(1, 16, size // 8, size // 8, generator=generator),
        "t": torch.rand(1, generator=generator),
        "c_crossattn": torch.randn(1, 64, 256, generator=generator)
    }
    plus, minus = (run(patched(flux(dtype), (lora, strength)), inputs) for strength in (1.0, -1.0))
    return plus - minus


def step_gain(size: int, norm: float, count: int) -> Gain:
    gain = Gain()
    for seed in range(count):
        gain.add(*(effect(size, norm, dtype, seed) for dtype in (torch.bfloat16, torch.float32)))
    return gain


@pytest.mark.parametrize(("size", "norm", "count"), [
    (512, 0.01, 3), *(pytest.param(*case, marks=pytest.mark.heavy) for case in (
        (768, 0.05, 1), (512, 0.003, 12), (768, 0.01, 3)))])
def test_in_a_whole_step(size, norm, count):
    step_gain(size, norm, count).assert_full(f"{size} pixels, a norm of {norm:.2%}")
