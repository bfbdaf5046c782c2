"""A LoRA has its full strength: in every dtype, for any number of rows, however weak, on every kind
of layer and format."""
import functools
import math

from devtools.measure.weights import random_weight

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import BOFTAdapter, LoRAAdapter, OFTAdapter
from host_formats import TABLE_FORMATS, in_host_format
from host_patches import patched_by_host
from lora_gain import NORMS, OUTPUTS, Gain, assert_full_strength
from pack_api import (
    FORMATS,
    QuantizedTensor,
    open_weights,
    packed_operations,
    packed_tensor,
    random_tensors,
    relabel,
)
from patched_layers import RANK, plain_lora, value_of, with_patches
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
from featherweight.ops.formats.bnb_int8 import INT8
from featherweight.ops.layers import fast_on_cpu
from featherweight.ops.layers.comfyui_operations import operations_for
from featherweight.ops.low_rank import LowRank
from featherweight.ops.patcher import adopt

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


def at_strengths(layer, value):
    """strength -> the host's patches of an adapter, for `measured`."""
    def patches_at(strength):
        # turn the weight, which goes with the square of the strength
        if isinstance(value, (OFTAdapter, BOFTAdapter)):
            return [(1.0, type(value)(set(), (value.weights[0] * strength, *value.weights[1:])),
                     1.0, None, None)]
        return [(strength, value, 1.0, None, None)]

    return measured(layer, patches_at)


def measured(layer, patches_at):
    """(run, weight_change, base) for `assert_full_strength`, of a layer with the patches of a
    strength."""
    dense = values_of(layer.weight)

    def run(input, strength):
        with torch.no_grad():
            return with_patches(layer, patches_at(strength), input.dtype)(input)

    def weight_change(strength):
        return patched_by_host(patches_at(strength), dense) - dense

    return run, weight_change, (2 * dense.norm() / (weight_change(1) - weight_change(-1)).norm()
                                ).item()


def assert_layer_at_full_strength(layer, value, rows: int, dtype, norms=NORMS,
                                  outputs: int | None = None):
    run, weight_change, base = at_strengths(layer, value)
    draws = max(1, (outputs or OUTPUTS[dtype]) // (rows * layer.weight.shape[0]))
    inputs = [torch.randn(rows, layer.weight.shape[1]).to(dtype) for _ in range(draws)]
    assert_full_strength(run, inputs, weight_change, norms, base)


def assert_arrives(layer, value, inputs, product, norm: float):
    """product(input, change of the weight): the change of the output, exact."""
    run, weight_change, base = at_strengths(layer, value)
    strength, gain = norm * base, Gain()
    exact = weight_change(strength) - weight_change(-strength)
    for input in inputs:
        gain.add(run(input, strength).double() - run(input, -strength).double(),
                 product(input, exact))
    gain.assert_full(f"a norm of {norm:.2%}")


# --- rows, dtypes, formats ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [
    rows if rows in (1, 256, 1537) else pytest.param(rows, marks=pytest.mark.heavy)
    for rows in ROWS])
def test_at_any_number_of_rows(rows, dtype):
    wide = max(64, min(16384, OUTPUTS[dtype] // rows // 2))
    layer = layer_of(random_weight("Q8_0", (wide, 32)), dtype)
    assert_layer_at_full_strength(layer, plain_lora(wide, 32), rows, dtype)


@pytest.mark.parametrize(("stored", "dtype", "rows"), [
    *(pytest.param(name, torch.bfloat16, rows, marks=() if name in EACH_WAY and (
        rows == 4096 or name in ("MXFP4", "INT8")) else pytest.mark.heavy)
      for name in (*GGML, "NF4", "FP4", "INT8") for rows in (256, 4096)),
    (torch.bfloat16, torch.bfloat16, 4096), (torch.float16, torch.float32, 4096),
    *(pytest.param(stored, dtype, 4096, marks=pytest.mark.heavy) for stored, dtype in (
        (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)))], ids=str)
def test_on_every_format_and_on_dense_layers(stored, dtype, rows):
    """The LoRA is added to the product, whatever the weight is packed to."""
    shape = 2048, 256
    weight = (even_weight(stored, shape) if isinstance(stored, str)
              else torch.randn(shape).to(stored) / 16)
    assert_layer_at_full_strength(layer_of(weight, dtype), plain_lora(*shape), rows, dtype, WEAKEST)


# --- several at once ---


SEVERAL = {  # (share of the norm of the weight, or None for the strength; slice of rows or None)
    "each of four, next to stronger ones": (
        1, [(0.05, None), (-0.03, None), (None, None), (0.01, None)]),
    # as where one file has q, k and v apart and another has them in one
    "on a slice, next to a strong one on the whole": (3, [(0.5, None), (None, (0, 1024, 1024))])}


@pytest.mark.parametrize(("parts", "loras"), SEVERAL.values(), ids=SEVERAL)
def test_of_a_weak_one(parts, loras):
    rows, columns = (2048 if parts == 1 else 1024 * parts), 256
    layer = layer_of(random_weight("Q4_K", (rows, columns)), torch.bfloat16)
    norm = values_of(layer.weight).norm()
    values = [plain_lora(rows if offset is None else offset[2], columns) for _, offset in loras]

    def patches_at(strength):
        return [(strength if share is None else
                 (share * norm / (value.weights[0] @ value.weights[1]).norm()).item(),
                 value, 1.0, offset, None) for (share, offset), value in zip(loras, values)]

    run, weight_change, base = measured(layer, patches_at)
    inputs = [torch.randn(4096, columns, dtype=torch.bfloat16) for _ in range(2)]
    assert_full_strength(run, inputs, weight_change, WEAK, base / parts**0.5)


# --- factors out of balance ---


def out_of_balance(times: float, rows: int, *columns: int, rank: int = RANK):
    """The same product; some trainers leave one factor that many times larger than the other. Each
    rank has its own share."""
    up, down, *others = plain_lora(rows, *columns).weights
    each = torch.logspace(0, 1, rank).sub(1).div(9) * (times - 1) + 1
    return LoRAAdapter(set(), (up / each.view(-1, *(1 for _ in columns[1:])),
                               down * each.view(-1, *(1 for _ in columns)), *others))


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
    assert_arrives(layer, out_of_balance(times, *shape), [torch.randn(4, 64, 24, 24).half()],
                   lambda input, exact: torch.nn.functional.conv2d(input.float(), exact), 0.005)


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
    weight = (random_weight(format_name, shape) if format_name
              else torch.randn(shape, dtype=dtype) / 16)
    value = value_of(adapter(kind, values_of(weight), 1, size=0.05))
    rows = 2048 if dtype == torch.bfloat16 else 64
    assert_layer_at_full_strength(layer_of(weight, dtype), value, rows, dtype, WEAK)


# --- other layers ---


@pytest.mark.parametrize(("name", "kernel", "size", "kind"), [
    ("Conv1d", (3,), (512,), "lora"), ("Conv2d", (3, 3), (24, 24), "lora"),
    ("Conv2d", (3, 3), (8, 8), "lora"), ("Conv2d", (1, 1), (24, 24), "lora"),
    ("Conv3d", (1, 3, 3), (2, 16, 16), "lora"), ("Conv2d", (3, 3), (24, 24), "dora"),
    ("Conv2d", (3, 3), (24, 24), "lokr")])
def test_on_convolutions(name, kernel, size, kind):
    weight = relabel(random_weight("Q8_0", (512, 64 * math.prod(kernel))),
                     shape=(512, 64, *kernel))
    value = value_of(adapter(kind, values_of(weight), 1, size=0.05))
    convolve = getattr(torch.nn.functional, name.lower())
    inputs = [torch.randn(1, 64, *size, dtype=torch.bfloat16)
              for _ in range(max(1, 4608 // math.prod(size)))]
    # the rounding of a weight this small averages out no further
    assert_arrives(layer_of(weight, torch.bfloat16, name), value, inputs,
                   lambda input, exact: convolve(input.float(), exact),
                   0.003 if kind == "lora" else 0.01)


@pytest.mark.parametrize(("kind", "format_name"), [
    *(("lora", name) for name in ("MXFP4", *TABLE_FORMATS)), ("lokr", "MXFP4"),
    ("lokr", "float8_e4m3fn")])
def test_on_embeddings(kind, format_name):
    shape, hosts = (4096, 1024), format_name in TABLE_FORMATS
    layer = packed_operations(mixed=hosts).Embedding(*shape, dtype=torch.bfloat16)
    layer.load_state_dict(in_host_format("weight", torch.randn(shape) / 16, format_name)[0] if hosts
                          else {"weight": random_weight(format_name, shape)})
    value = value_of(adapter(kind, values_of(layer.weight), 1, size=0.05))
    for norm in WEAK:
        assert_arrives(layer, value, [torch.arange(4096)], lambda ids, exact: exact[ids], norm)


class AllExperts:
    """The experts of a layer, each on the same input."""

    def __init__(self, layer):
        self.layer, self.weight, self.has_branch = layer, layer.weight, layer.has_branch

    def __call__(self, input):
        self.layer.lora = self.lora
        with self.layer.bank_resident(input) as bank:
            return torch.stack([bank.expert_linear(input, expert)
                                for expert in range(len(self.weight))])


@pytest.mark.parametrize("norm", WEAK)
def test_on_experts(norm):
    shape = experts, rows, columns = 4, 1024, 1024
    layer = packed_operations().MoEExperts(experts, columns, rows, bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({
        "weight": relabel(random_weight("MXFP4", (experts * rows, columns)), shape=shape)})
    assert_arrives(AllExperts(layer), (torch.randn(shape),),
                   [torch.randn(2048, columns, dtype=torch.bfloat16)],
                   lambda input, exact: input.float() @ exact.transpose(1, 2), norm)


# --- other ways to the product ---


@pytest.mark.skipif(not fast_on_cpu.multiplies_integers(CPU),
                    reason="the CPU has no units for int8")
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
    _, weight_change, base = at_strengths(layer, value := plain_lora(2048, 256))
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer

    def run(input, strength):
        with_patches(layer, [(strength, value, 1.0, None, None)], input.dtype)
        with torch.set_grad_enabled(way == "with gradients"):
            return call(input.clone().requires_grad_(way == "with gradients")).detach()

    inputs = [torch.randn(4096, 256, dtype=torch.bfloat16)]
    assert_full_strength(run, inputs, weight_change, WEAK, base)


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


@pytest.mark.parametrize(("size", "norm", "count"), [
    (512, 0.01, 3), *(pytest.param(*case, marks=pytest.mark.heavy) for case in (
        (768, 0.05, 1), (512, 0.003, 12), (768, 0.01, 3)))])
def test_in_a_whole_step(size, norm, count):
    gain = Gain()
    for seed in range(count):
        gain.add(*(effect(size, norm, dtype, seed) for dtype in (torch.bfloat16, torch.float32)))
    gain.assert_full(f"{size} pixels, a norm of {norm:.2%}")
