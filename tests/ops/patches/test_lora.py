"""Patches on packed weights give what the host's own patching gives on dense weights of the same
values, in float32."""
import contextlib

import comfy.lora
import comfy.utils
import pytest
import torch
import torch._dynamo.testing
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from gpu_memory import BOTH
from pack_api import packed_operations, product
from patched_layers import value_of, with_patches
from patched_models import (
    FORMAT_NAMES,
    KINDS,
    LIMIT,
    adapter,
    broken,
    dense_flux,
    error_by_effect,
    flux_file,
    flux_inputs,
    flux_pair,
    lora_for,
    packed_anyhow,
    packed_flux,
    packed_layers,
    patched,
    relative,
    run,
)

from featherweight.ops.layers import workspace
from featherweight.ops.patches.adapters import shape_mismatch
from featherweight.ops.patches.layer_patches import LayerPatches, build_patches

OPERATIONS = packed_operations()
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")
# One format with all numbers in the blocks, one with scales apart.
ALL_KINDS = ("Q4_K", "INT8")


def assert_same_effect(format_name, *loras):
    packed, dense = flux_pair(format_name)
    count = len(packed_layers(packed))
    without, expected = run(dense), run(patched(dense, *loras))
    assert error_by_effect(run(patched(packed, *loras)), expected, without) < LIMIT
    assert len(packed_layers(packed)) == count


# --- kinds and stacks ---


STACKS = ("lora lora", "lora lora lora lora", "lora dora lora", "loha lora", "lora set lora",
          "oft lora glora", "lora diff lokr")
IN_ALL = ("lora", "dora", "lora dora lora")  # formats; the others are heavy but in two


@pytest.mark.parametrize(("format_name", "kinds"), [
    pytest.param(name, kinds, marks=() if name in ALL_KINDS or kinds in IN_ALL
                 else pytest.mark.heavy)
    for name in FORMAT_NAMES for kinds in (*KINDS, *STACKS)])
def test_loras_of_every_kind_have_their_exact_effect_in_their_order(format_name, kinds):
    values = flux_file(format_name)[1]
    loras = [lora_for(values, kind, seed) for seed, kind in enumerate(kinds.split())]
    assert_same_effect(format_name, *zip(loras, (0.9, 1.0, -0.7, 0.5)))


def lora_by_diffusers_names(values):
    """As PEFT writes it."""
    config, lora = flux_pair("Q8_0")[0].model.model_config.unet_config, {}
    names = comfy.utils.flux_to_diffusers(config, output_prefix="")
    for seed, (name, target) in enumerate(names.items()):
        target, part, *_ = target if isinstance(target, tuple) else (target, None)
        weight = values.get(target)
        if weight is not None and weight.ndim == 2:
            factors = adapter("lora", weight if part is None else weight.narrow(*part), seed)
            layer = f"transformer.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_B.weight"] = factors["lora_up.weight"]
            lora[f"{layer}.lora_A.weight"] = factors["lora_down.weight"] * 0.5
    return lora


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_loras_on_slices_of_fused_weights(format_name):
    lora = lora_by_diffusers_names(flux_file(format_name)[1])
    assert sum("to_q" in name or "proj_mlp" in name for name in lora) >= 4
    assert_same_effect(format_name, (lora, 0.8), (lora, 0.3))


@pytest.mark.parametrize("strength_model", [1.0, 0.5])
def test_slices_of_columns_functions_and_scaled_weights(strength_model):
    packed, dense = flux_pair("Q4_K")
    key = "diffusion_model.single_blocks.0.linear2.weight"
    weight = flux_file("Q4_K")[1]["single_blocks.0.linear2.weight"]

    def lora(part, seed):
        return value_of(adapter("lora", part, seed, size=3.0))

    patches = [
        {(key, (1, 256, 512)): lora(weight[:, 256:768], 1)},
        {(key, (0, 64, 128)): lora(weight[64:192], 2)},
        {(key, None, lambda delta: delta.tril()): lora(weight, 3)},
        {key: (torch.full_like(weight, 0.05),)}]

    def with_all(patcher):
        patcher = patcher.clone()
        for patch in patches:
            patcher.add_patches(patch, 0.8, strength_model)
        return patcher

    without = run(dense)
    assert error_by_effect(run(with_all(packed)), run(with_all(dense)), without) < LIMIT


@pytest.mark.parametrize("is_dynamic", [pytest.param(None, id="on a CPU"), BOTH[1]])
def test_a_control_lora_reshapes_a_layer_and_gives_it_back(is_dynamic):
    packed, dense = packed_flux("Q8_0"), dense_flux("Q8_0")
    assert packed.is_dynamic() == bool(is_dynamic)
    values, control = flux_file("Q8_0")[1], {}
    for name, weight in (("img_in", torch.cat([values["img_in.weight"]] * 2, 1)),
                         ("single_blocks.0.linear1", values["single_blocks.0.linear1.weight"])):
        factors = adapter("lora", weight, 1)
        control[f"{name}.lora_A.weight"] = factors["lora_down.weight"]
        control[f"{name}.lora_B.weight"] = factors["lora_up.weight"]
        control[f"{name}.lora_B.bias"] = torch.full((weight.shape[0],), 0.1)
    control["single_blocks.0.norm.key_norm.scale"] = torch.linspace(0.8, 1.2, 128)
    plain, count = lora_for(values), len(packed_layers(packed))
    without, inputs = run(dense), flux_inputs(concat=True)
    assert torch.equal(run(packed), without)
    for stack in ([(control, 1.0)], [(plain, 0.5), (control, 1.0)], [(control, 1.0), (plain, 0.5)]):
        actual, expected = (run(patched(patcher, *stack), inputs) for patcher in (packed, dense))
        assert error_by_effect(actual, expected, without) < LIMIT
        assert len(packed_layers(packed)) == count - 1  # the host replaced the widened layer
        assert torch.equal(run(packed), without) and len(packed_layers(packed)) == count
    run(patched(packed, *stack), inputs)
    actual, expected = (run(patched(patcher, (plain, 0.5))) for patcher in (packed, dense))
    assert error_by_effect(actual, expected, without) < LIMIT
    assert len(packed_layers(packed)) == count


# --- what does not fit ---


def without_parts(lora: dict, what: str) -> dict:
    return {name: tensor for name, tensor in lora.items() if what not in name}


FACTORS = ("wrong rows", "wrong columns", "ranks that differ", "rank 0", "nan", "inf")


@pytest.mark.parametrize(("kind", "what"), [
    *((kind, what) for kind in ("lora", "dora", "loha") for what in FACTORS),
    *(("lokr", what) for what in (*FACTORS[1:], "without w2_b")),
    *(("diff", what) for what in ("wrong rows", "wrong columns", "nan")),
    *((kind, what) for kind in ("oft", "boft") for what in ("wrong blocks", "nan")),
    ("lora", "without lora_up"), ("boft", "without alpha")])
def test_a_lora_that_does_not_fit_is_left_out_with_one_warning_a_weight(kind, what, caplog):
    packed, _ = flux_pair("Q8_0")
    values = {name: value for name, value in flux_file("Q8_0")[1].items()
              if name.startswith("double_blocks")}
    good, bad = lora_for(values), lora_for(values, kind, 1)
    bad = (without_parts(bad, what.removeprefix("without ")) if what.startswith("without")
           else broken(bad, what))
    bad = without_parts(bad, "diff_b")  # belongs to a dense bias: it does fit
    without, good_alone = run(packed), run(patched(packed, (good, 0.8)))
    weights = sum(value.ndim > 1 for value in values.values())
    for loras, expected in (((bad, 1.0),), without), (((good, 0.8), (bad, 1.0)), good_alone):
        patcher = patched(packed, *loras)
        caplog.clear()
        actual = [run(patcher), run(patcher)]
        assert torch.equal(actual[0], expected) and torch.equal(actual[1], expected)
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == (0 if what == "without lora_up" else weights)  # the host's is another
        assert all("left out of diffusion_model.double_blocks.0." in line for line in told)


def test_half_a_pair_that_the_host_refuses_leaves_the_model_as_it_was():
    packed, _ = flux_pair("Q8_0")
    without = run(packed)
    with pytest.raises(KeyError):
        patched(packed, (without_parts(lora_for(flux_file("Q8_0")[1]), "lora_down"), 1.0))
    assert torch.equal(run(packed), without)


def older_glora(factors: dict) -> dict:
    """As LyCORIS wrote it at first: each factor is the other's turned, and they follow each other
    in the other order."""
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {
        f"{names[name[:2]]}.weight" if name[:2] in names else name: tensor
        for name, tensor in factors.items()
    }


GLORA_SHAPES = [(48, 64), (64, 48), (64, 64), (48, 64, 3, 3), (64, 64, 3, 3), (64, 48, 1, 1)]


@pytest.mark.parametrize("rank", [1, 4, 36, 48, 64, 80])
@pytest.mark.parametrize("shape", GLORA_SHAPES, ids=str)
@pytest.mark.parametrize("order", [dict, older_glora])
def test_glora_of_any_rank_does_to_a_packed_weight_what_the_host_does_to_a_dense_one(
        order, shape, rank, caplog):
    packed, dense = packed_anyhow(torch.randn(shape) / 8, "Q8_0")
    factors = adapter("glora", dense, 1, rank) | {"alpha": torch.tensor(rank / 2)}
    if len(shape) > 2 and order is dict:  # of a convolution the newer ones multiply the channels
        factors["b2.weight"] = factors["b2.weight"].view(rank, *shape[1:])
    elif len(shape) > 2:
        columns = dense[0].numel()
        factors |= {"a1.weight": torch.randn(columns, rank) / 24,
                    "a2.weight": torch.randn(rank, columns) / 24}
    patches = [(0.7, value_of(order(factors)), 1.0, None, None)]
    expected = comfy.lora.calculate_weight(patches, dense.clone(), "weight")
    host_failed = bool(caplog.records)
    layer_patches = build_patches("w", patches, dense.shape, CPU, torch.float32)
    assert host_failed == (layer_patches is None) == torch.equal(expected, dense)
    if host_failed:
        assert len(shape) > 2 and rank == shape[0] == shape[1] and order is dict
    else:
        assert torch.equal(layer_patches.patch_weight(packed.dequantize()), expected)


def test_glora_of_two_ranks_is_left_out_where_the_host_cannot_scale_it():
    weight = torch.randn(48, 64)
    factors, wider = adapter("glora", weight, 1, 4), adapter("glora", weight, 1, 6)
    factors |= {name: wider[name] for name in ("b1.weight", "b2.weight")}
    for alpha in ({}, {"alpha": torch.tensor(2.0)}):
        value = value_of(factors | alpha)
        with pytest.raises(UnboundLocalError) if alpha else contextlib.nullcontext():
            comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), "w")
        told = "its factors do not fit each other" if alpha else None
        assert shape_mismatch(value, weight.shape) == told


class Unknown(WeightAdapterBase):
    """An adapter as another pack may define it: a constructor of its own, weights of any type."""

    name = "unknown"

    def __init__(self, *, gain: float, **attributes):
        self.gain = gain
        vars(self).update(attributes)

    def calculate_weight(self, weight, key, strength, *args, **kwargs):
        return weight * (1 + strength * self.gain) + 0.01 * strength


WEIGHTS = {"none": {}, "a vector": {"weights": [torch.ones(3)]}, "names": {"weights": {"a": "b"}},
           "a matrix": {"weights": (torch.ones(2, 2), None)}, "an empty one": {
               "weights": torch.ones(0)}, "no tensor": {"weights": None, "loaded_keys": set()}}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("loras", [0, 1])
def test_adapters_that_are_not_known_here_act_as_on_dense_weights(weights, loras, caplog):
    unknown = Unknown(gain=0.3, **WEIGHTS[weights])
    packed, dense = flux_pair("Q4_K")
    lora, values = lora_for(flux_file("Q4_K")[1]), flux_file("Q4_K")[1]
    patches = {f"diffusion_model.{name}": unknown
               for name, value in values.items() if value.ndim == 2}

    def with_unknown(patcher):
        patcher = patched(patcher, *[(lora, 0.5)] * loras).clone()
        patcher.add_patches(patches, 0.7)
        return patcher

    without, expected = run(dense), run(with_unknown(dense))
    assert error_by_effect(run(with_unknown(packed)), expected, without) < LIMIT
    assert "left out" not in caplog.text


# --- the branch ---


def branch_of(rows, columns, *parts, seed=0):
    """LayerPatches of LoRAs on the given slices of rows: (first row, end row, rank) each."""
    generator = torch.Generator().manual_seed(seed)
    patches = []
    for row, row_end, rank in parts:
        up = torch.randn(row_end - row, rank, generator=generator) / 150
        down = torch.randn(rank, columns, generator=generator)
        patches.append((1.0, LoRAAdapter(set(), (up, down, float(rank), None, None, None)), 1.0,
                        (0, row, row_end - row), None))
    return build_patches("x.weight", patches, torch.Size((rows, columns)), CPU, torch.float32)


# also in slices of rows that cut through the slices of the LoRA
@pytest.mark.parametrize("scratch_bytes", [1, 1 << 26])
@pytest.mark.parametrize("slices", [
    [(0, 96, 4), (16, 48, 8), (16, 48, 2), (33, 96, 3)],
    [(0, 32, 4), (32, 64, 8), (64, 96, 2)], [(0, 32, 4), (64, 80, 2)]],
    ids=["overlapping", "on all rows", "on some rows"])
def test_slices_add_up_with_gradients_and_without(slices, scratch_bytes, monkeypatch):
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", scratch_bytes)
    weight, dense = packed_anyhow(torch.randn(96, 512) / 20, "Q8_0")
    patches = branch_of(96, 512, *slices)
    input, twin = (torch.linspace(-1, 1, 5 * 512).view(5, 512).requires_grad_() for _ in range(2))
    expected = torch.nn.functional.linear(twin, patches(dense.clone()))
    base = torch.nn.functional.linear(twin, dense)
    output = product.linear(input, weight, None, patches.branch(input))
    without_gradient = product.linear(input.detach(), weight, None, patches.branch(input))
    for actual in (output, without_gradient):
        assert error_by_effect(actual, expected, base) < LIMIT
    output.sum().backward()
    expected.sum().backward()
    assert relative(input.grad, twin.grad) < 1e-6


# --- dtypes, compilation ---


def test_compiled_with_a_lora_there_is_no_graph_break_and_a_strength_recompiles_nothing():
    weight, dense = packed_anyhow(torch.randn(96, 512) / 20, "Q4_K")
    layer = OPERATIONS.Linear(512, 96, dtype=torch.float32)
    layer.load_state_dict({"weight": weight, "bias": torch.ones(96)})
    input = torch.randn(4, 512)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    with torch.no_grad():
        for seed in (0, 1, 2, 3, 0):
            layer.lora = branch_of(96, 512, (0, 96, 4), seed=seed) if seed else None
            merged = layer.lora(dense) if seed else dense
            expected = torch.nn.functional.linear(input, merged, torch.ones(96))
            assert relative(compiled(input), expected) < 1e-6
            frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_that_runs_elsewhere_or_in_another_dtype_takes_its_factors_along(device):
    patches = branch_of(96, 512, (0, 96, 4))
    input = torch.empty(1, 512, dtype=torch.bfloat16, device=device)
    low_rank = patches.branch(input)
    assert {(factor.dtype, factor.device.type) for factor in (low_rank.down, *low_rank.ups)} == {
        (torch.bfloat16, device)}
    assert patches.branch(input) is low_rank
    assert LayerPatches("x").branch(input) is None


@pytest.mark.parametrize("kind", KINDS)
def test_patches_that_act_on_rows_take_the_weight_in_slices(kind, monkeypatch):
    weight, dense = packed_anyhow(torch.randn(96, 320) / 8, "Q4_K")
    patches = [(0.9, value_of(adapter(kind, dense, 1)), 1.0, None, None)]
    layer = OPERATIONS.Linear(320, 96, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    layer.has_branch = False
    with_patches(layer, patches)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 20 * 320 * 4)
    rows, calculate = [], comfy.lora.calculate_weight
    monkeypatch.setattr(comfy.lora, "calculate_weight",
                        lambda p, w, *a, **k: rows.append(len(w)) or calculate(p, w, *a, **k))
    input = torch.randn(2, 320)
    merged = calculate(patches, dense.clone(), "weight")
    assert relative(layer(input), torch.nn.functional.linear(input, merged)) < 1e-6
    by_rows = kind in ("lora", "locon", "loha", "diff", "set")
    assert rows == ([20, 20, 20, 20, 16] if by_rows else [96])
