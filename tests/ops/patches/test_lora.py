"""Patches on packed weights give what the host's own patching gives on dense weights of the same
values, in float32."""
import contextlib
import logging

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import pytest
import torch
import torch._dynamo.testing
from comfy.ops import manual_cast
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from host_patches import patched_by_host
from patched_models import (
    FORMAT_NAMES,
    KINDS,
    LIMIT,
    adapter,
    broken,
    error_by_effect,
    flux_file,
    flux_inputs,
    flux_pair,
    lora_for,
    packed_anyhow,
    packed_layers,
    patched,
    relative,
    run,
)

from featherweight.ops.layers import product, workspace
from featherweight.ops.layers.comfyui_operations import packed_operations
from featherweight.ops.patches.adapters import shape_mismatch
from featherweight.ops.patches.layer_patches import LayerPatches, build_patches
from featherweight.ops.tensor.packed_layout import is_packed

OPERATIONS = packed_operations()


pytestmark = pytest.mark.usefixtures("small_models", "no_model_outlives_its_tests")
# One format with all numbers in the blocks, one with scales apart.
ALL_KINDS = ("Q4_K", "INT8")


def with_formats(cases, in_all: tuple) -> list:
    """(format, case): every case in some formats, those of `in_all` in all, the others heavy."""
    return [
        pytest.param(
            name, case, marks=() if name in ALL_KINDS or case in in_all else pytest.mark.heavy)
        for name in FORMAT_NAMES for case in cases
    ]


def assert_same_effect(format_name, *loras, inputs=None):
    packed, dense = flux_pair(format_name)
    count = len(packed_layers(packed))
    without = run(dense)
    expected = run(patched(dense, *loras), inputs)
    actual = run(patched(packed, *loras), inputs)
    assert error_by_effect(actual, expected, without) < LIMIT
    assert len(packed_layers(packed)) == count


# --- kinds and stacks ---


@pytest.mark.parametrize(("format_name", "kind"), with_formats(KINDS, ("lora", "dora")))
def test_every_kind_of_lora_has_its_exact_effect(format_name, kind):
    assert_same_effect(format_name, (lora_for(flux_file(format_name)[1], kind), 0.9))


STACKS = ("lora-lora", "lora-lora-lora-lora", "lora-dora-lora", "loha-lora", "lora-set-lora",
          "oft-lora-glora", "lora-diff-lokr")


@pytest.mark.parametrize(("format_name", "kinds"), with_formats(STACKS, ("lora-dora-lora",)))
def test_stacked_loras_have_their_exact_effect_in_their_order(format_name, kinds):
    values = flux_file(format_name)[1]
    loras = [lora_for(values, kind, seed) for seed, kind in enumerate(kinds.split("-"))]
    assert_same_effect(format_name, *zip(loras, (1.0, -0.7, 0.5, 0.3)))


def diffusers_names():
    """The host's table for this model: diffusers' name -> (the model's name, slice or None,
    ...)."""
    config = flux_pair("Q8_0")[0].model.model_config.unet_config
    names = comfy.utils.flux_to_diffusers(config, output_prefix="")
    return {name.removesuffix(".weight"): target if isinstance(target, tuple) else (target, None)
            for name, target in names.items() if name.endswith(".weight")}


def lora_by_diffusers_names(values):
    """As PEFT writes it."""
    lora = {}
    for seed, (name, (target, part, *_)) in enumerate(diffusers_names().items()):
        weight = values.get(target)
        if weight is None or weight.ndim != 2:
            continue
        weight = weight if part is None else weight.narrow(*part)
        factors = adapter("lora", weight, seed)
        lora[f"transformer.{name}.lora_B.weight"] = factors["lora_up.weight"]
        lora[f"transformer.{name}.lora_A.weight"] = factors["lora_down.weight"] * 0.5
    return lora


@pytest.mark.parametrize("format_name", FORMAT_NAMES)
def test_loras_on_slices_of_fused_weights(format_name):
    lora = lora_by_diffusers_names(flux_file(format_name)[1])
    names = [name for name in lora if "to_q" in name or "proj_mlp" in name]
    assert len(names) >= 4
    assert_same_effect(format_name, (lora, 0.8), (lora, 0.3))


@pytest.mark.parametrize("strength_model", [1.0, 0.5])
def test_slices_of_columns_functions_and_scaled_weights(strength_model):
    packed, dense = flux_pair("Q4_K")
    key = "diffusion_model.single_blocks.0.linear2.weight"
    weight = flux_file("Q4_K")[1]["single_blocks.0.linear2.weight"]

    def lora(part, seed):
        factors = adapter("lora", part, seed, size=2.0)
        return LoRAAdapter(
            set(), (factors["lora_up.weight"], factors["lora_down.weight"], 3.0, None, None, None))

    patches = [{(key, (1, 256, 512)): lora(weight[:, 256:768],
                                           1)}, {(key, (0, 64, 128)): lora(weight[64:192], 2)},
               {(key, None, lambda delta: delta.tril()): lora(weight, 3)},
               {key: (torch.full_like(weight, 0.05),)}]

    def with_patches(patcher):
        patcher = patcher.clone()
        for patch in patches:
            patcher.add_patches(patch, 0.8, strength_model)
        return patcher

    without = run(dense)
    assert error_by_effect(run(with_patches(packed)), run(with_patches(dense)), without) < LIMIT


def test_a_control_lora_reshapes_a_layer_and_gives_it_back():
    packed, dense = flux_pair("Q8_0")
    values = flux_file("Q8_0")[1]
    wide = torch.cat([values["img_in.weight"]] * 2, 1)
    lora = {}
    for name, weight in (("img_in", wide), ("single_blocks.0.linear1",
                                            values["single_blocks.0.linear1.weight"])):
        factors = adapter("lora", weight, 1)
        lora[f"{name}.lora_A.weight"], lora[f"{name}.lora_B.weight"] = (
            factors["lora_down.weight"],
            factors["lora_up.weight"],
        )
        lora[f"{name}.lora_B.bias"] = torch.full((weight.shape[0],), 0.1)
    lora["single_blocks.0.norm.key_norm.scale"] = torch.linspace(0.8, 1.2, 128)
    count = len(packed_layers(packed))
    without, inputs = run(dense), flux_inputs(concat=True)
    controlled = patched(packed, (lora, 1.0))
    assert (
        error_by_effect(run(controlled, inputs), run(patched(dense, (lora, 1.0)), inputs), without)
        < LIMIT
    )
    assert len(packed_layers(packed)) == count - 1  # the host replaced the widened layer
    assert torch.equal(run(packed), without) and len(packed_layers(packed)) == count
    plain = lora_for(values)
    run(patched(packed, (lora, 1.0), (plain, 0.5)), inputs)
    expected = run(patched(dense, (plain, 0.5)))
    assert error_by_effect(run(patched(packed, (plain, 0.5))), expected, without) < LIMIT
    assert len(packed_layers(packed)) == count


# --- convolutions ---


CONVOLUTIONS = {
    "2d": ("Conv2d", (3, 3), (1, 32, 6, 5)), "1x1": ("Conv2d", (1, 1), (1, 32, 6, 5)),
    "1d": ("Conv1d", (3,), (1, 32, 9)), "3d": ("Conv3d", (1, 2, 2), (1, 32, 2, 4, 4))}


@pytest.mark.parametrize(("convolution", "kind"), [
    *(("2d", kind) for kind in KINDS if kind != "loha-dora"),
    *((name, kind) for name in ("1x1", "1d", "3d") for kind in ("lora", "dora", "lokr"))])
def test_patches_on_packed_convolutions(convolution, kind):
    name, kernel, input_shape = CONVOLUTIONS[convolution]
    weight, dense = packed_anyhow(torch.randn(64, 32, *kernel) / 8, "Q8_0")
    layer = getattr(OPERATIONS, name)(32, 64, kernel, dtype=torch.float32)
    layer.load_state_dict({"weight": weight, "bias": torch.ones(64)})
    lora = {f"x.{suffix}": tensor for suffix, tensor in adapter(kind, dense, 1).items()}
    value = comfy.lora.load_lora(lora, {"x": "w.weight"})["w.weight"]
    patches = [(0.9, value, 1.0, None, None)]
    layer.lora = build_patches("w.weight", patches, weight.shape, torch.device("cpu"),
                               torch.float32, layer.has_branch)
    merged = patched_by_host(patches, dense, "w.weight")
    twin = getattr(manual_cast, name)(32, 64, kernel, dtype=torch.float32)
    twin.load_state_dict({"weight": merged, "bias": torch.ones(64)})
    input = torch.randn(input_shape)
    assert relative(merged, dense) > 0.05
    with torch.no_grad():
        assert relative(layer(input), twin(input)) < 1e-6 and is_packed(layer.weight)


# --- what does not fit ---


@pytest.mark.parametrize(("kind", "what"), [
    (kind, what) for kind in ("lora", "dora", "loha", "lokr")
    for what in ("wrong rows", "wrong columns", "ranks that differ", "rank 0", "nan", "inf")
    if (kind, what) not in (("lokr", "wrong rows"),)
] + [("diff", what) for what in ("wrong rows", "wrong columns", "nan")]
  + [(kind, what) for kind in ("oft", "boft") for what in ("wrong blocks", "nan")])
def test_a_lora_that_does_not_fit_is_left_out_with_one_warning_a_weight(kind, what, caplog):
    packed, dense = flux_pair("Q8_0")
    values = {
        name: value for name, value in flux_file("Q8_0")[1].items()
        if name.startswith("double_blocks")
    }
    good, bad = lora_for(values), broken(lora_for(values, kind, 1), what)
    # belongs to a dense bias: it does fit
    for name in [name for name in bad if name.endswith("diff_b")]:
        del bad[name]
    without, good_alone = run(packed), run(patched(packed, (good, 0.8)))
    weights = sum(value.ndim > 1 for value in values.values())
    for loras, expected in (((bad, 1.0),), without), (((good, 0.8), (bad, 1.0)), good_alone):
        patcher = patched(packed, *loras)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            actual = [run(patcher), run(patcher)]
        assert torch.equal(actual[0], expected) and torch.equal(actual[1], expected)
        assert len(caplog.records) == weights
        assert all("left out of diffusion_model.double_blocks.0." in record.getMessage()
                   for record in caplog.records)


def test_the_warning_says_what_the_lora_is_made_for(caplog):
    weight = torch.ones(8, 6)
    value = LoRAAdapter(set(), (torch.ones(8, 2), torch.ones(2, 12), None, None, None, None))
    assert (
        build_patches(
            "a.weight", [(1.0, value, 1.0, None, None)], weight.shape, "cpu", torch.float32
        )
        is None
    )
    assert (
        "left out of a.weight, which is 8 x 6: it is made for a weight of 8 x 12, not of 8 x 6."
        in caplog.text
    )


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
        factors |= {
            "a1.weight": torch.randn(columns, rank) / 24,
            "a2.weight": torch.randn(rank, columns) / 24
        }
    patch = (
        0.7,
        comfy.lora.load_lora(
            {f"x.{name}": tensor for name, tensor in order(factors).items()}, {"x": "w"}
        )["w"],
        1.0,
        None,
        None,
    )
    with caplog.at_level(logging.WARNING):
        expected = patched_by_host([patch], dense)
        host_failed = bool(caplog.records)
        layer_patches = build_patches("w", [patch], dense.shape, torch.device("cpu"), torch.float32)
    assert host_failed == (layer_patches is None) == torch.equal(expected, dense)
    if host_failed:
        assert len(shape) > 2 and rank == shape[0] == shape[1] and order is dict
    else:
        assert torch.equal(layer_patches.patch_weight(packed.dequantize()), expected)


def test_glora_of_two_ranks_is_left_out_where_the_host_cannot_scale_it():
    weight = torch.randn(48, 64)
    factors, wider = adapter("glora", weight, 1, 4), adapter("glora", weight, 1, 6)
    factors |= {name: wider[name] for name in ("b1.weight", "b2.weight")}
    for alpha in (None, torch.tensor(2.0)):
        lora = {
            f"x.{name}": tensor
            for name, tensor in (factors | ({} if alpha is None else {"alpha": alpha})).items()
        }
        value = comfy.lora.load_lora(lora, {"x": "w"})["w"]
        with contextlib.nullcontext() if alpha is None else pytest.raises(UnboundLocalError):
            comfy.lora.calculate_weight([(1.0, value, 1.0, None, None)], weight.clone(), "w")
        assert shape_mismatch(value, weight.shape) == (
            None if alpha is None else "its factors do not fit each other"
        )


def test_half_a_lokr_is_left_out(caplog):
    packed, _ = flux_pair("Q8_0")
    lora = {
        name: tensor for name, tensor in lora_for(flux_file("Q8_0")[1], "lokr").items()
        if "w2_b" not in name
    }
    without = run(packed)
    assert torch.equal(run(patched(packed, (lora, 1.0))), without)
    assert "its factors do not fit each other" in caplog.text


def test_a_diff_of_another_shape_is_left_out_even_of_as_many_values():
    diff = torch.ones(4, 4, 1, 1)
    for value in ((diff,), ("diff", (diff,)), ("set", (diff,))):
        assert (
            shape_mismatch(value, torch.Size((4, 4)))
            == "it is made for a weight of 4 x 4 x 1 x 1, not of 4 x 4"
        )
        assert shape_mismatch(value, diff.shape) is None


@pytest.mark.parametrize("half", ["up", "down"])
def test_half_a_pair_leaves_the_model_as_it_was(half):
    packed, _ = flux_pair("Q8_0")
    lora = {
        name: tensor for name, tensor in lora_for(flux_file("Q8_0")[1]).items()
        if f"lora_{half}" not in name
    }
    without = run(packed)
    with contextlib.nullcontext() if half == "up" else pytest.raises(KeyError):  # the host's answer
        assert torch.equal(run(patched(packed, (lora, 1.0))), without)
    assert torch.equal(run(packed), without)


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
    assert shape_mismatch(Unknown(gain=0.3, **WEIGHTS[weights]), torch.Size((8, 6))) is None
    packed, dense = flux_pair("Q4_K")
    without, lora = run(dense), lora_for(flux_file("Q4_K")[1])
    found = []
    for patcher in (dense, packed):
        patcher = patched(patcher, *[(lora, 0.5)] * loras)
        patcher = patcher.clone()
        patcher.add_patches({
            f"diffusion_model.{name}": Unknown(gain=0.3, **WEIGHTS[weights])
            for name, weight in patcher.model.diffusion_model.named_parameters()
            if weight.ndim == 2}, 0.7)
        found.append(run(patcher))
    assert error_by_effect(found[1], found[0], without) < LIMIT
    assert "left out" not in caplog.text


# --- the branch ---


def branch_of(rows, columns, *parts, seed=0):
    """LayerPatches of LoRAs on the given slices of rows: (first row, end row, rank) each."""
    generator = torch.Generator().manual_seed(seed)
    patches = []
    for row, row_end, rank in parts:
        factors = (
            torch.randn(row_end - row, rank, generator=generator) / 150,
            torch.randn(rank, columns, generator=generator),
        )
        patches.append((1.0, LoRAAdapter(set(), (*factors, float(rank), None, None, None)), 1.0,
                        (0, row, row_end - row), None))
    return build_patches("x.weight", patches, torch.Size((rows, columns)), torch.device("cpu"),
                         torch.float32)


# also in slices of rows that cut through the slices of the LoRA
@pytest.mark.parametrize("scratch_bytes", [1, 1 << 26])
def test_slices_that_overlap_add_up(monkeypatch, scratch_bytes):
    weight, dense = packed_anyhow(torch.randn(96, 512) / 20, "Q8_0")
    patches = branch_of(96, 512, (0, 96, 4), (16, 48, 8), (16, 48, 2), (33, 96, 3))
    input = torch.randn(5, 512)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", scratch_bytes)
    expected = torch.nn.functional.linear(input, patches(dense.clone()))
    base = torch.nn.functional.linear(input, dense)
    actual = product.linear(input, weight, None, patches.branch(input))
    assert error_by_effect(actual, expected, base) < LIMIT


def test_the_operator_has_a_right_fake_with_a_branch():
    weight, _ = packed_anyhow(torch.randn(96, 512) / 20, "Q8_0")
    patches = branch_of(96, 512, (0, 96, 4), (16, 48, 8))
    for bias in (None, torch.ones(96)):
        arguments = (
            torch.randn(2, 512),
            [weight._qdata],
            bias,
            "Q8_0",
            96,
            *patches.low_rank.operands,
        )
        torch.library.opcheck(torch.ops.featherweight.linear.default, arguments)


@pytest.mark.parametrize("slices", [
    [(0, 96, 4), (16, 48, 8)], [(0, 32, 4), (32, 64, 8), (64, 96, 2)], [(0, 32, 4), (64, 80, 2)]],
    ids=["overlapping", "on all rows", "on some rows"])
def test_branches_give_the_same_with_gradients_and_without(slices):
    weight, dense = packed_anyhow(torch.randn(96, 512) / 20, "Q8_0")
    patches = branch_of(96, 512, *slices)
    input, twin = (torch.ones(2, 512, requires_grad=True) for _ in range(2))
    output = product.linear(input, weight, None, patches.branch(input))
    expected = torch.nn.functional.linear(twin, patches(dense))
    assert relative(output, expected) < 1e-5
    assert (
        relative(
            product.linear(input.detach(), weight, None, patches.branch(input)), expected
        )
        < 1e-5
    )
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
        for parts, seed in (((), 0), (((0, 96, 4),), 1), (((0, 96, 4),), 2), (((0, 96, 4),), 3),
                            ((), 0)):
            layer.lora = branch_of(96, 512, *parts, seed=seed) if parts else None
            merged = layer.lora(dense) if parts else dense
            assert (
                relative(compiled(input), torch.nn.functional.linear(input, merged, torch.ones(96)))
                < 1e-6
            )
            frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2]
    torch._dynamo.reset()


def test_a_layer_that_runs_elsewhere_or_in_another_dtype_takes_its_factors_along():
    patches = branch_of(96, 512, (0, 96, 4))
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.bfloat16, "meta")):
        input = torch.empty(1, 512, dtype=dtype, device=device)
        low_rank = patches.branch(input)
        assert {
            (factor.dtype, factor.device.type) for factor in (low_rank.down, *low_rank.ups)
        } == {(dtype, device)}
        assert patches.branch(input) is low_rank
    assert LayerPatches("x").branch(input) is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reshape"])
def test_patches_that_act_on_rows_take_the_weight_in_slices(kind, monkeypatch):
    weight, dense = packed_anyhow(torch.randn(96, 320) / 8, "Q4_K")
    lora = {f"x.{suffix}": tensor for suffix, tensor in adapter(kind, dense, 1).items()}
    value = comfy.lora.load_lora(lora, {"x": "w.weight"})["w.weight"]
    patches = [(0.9, value, 1.0, None, None)]
    layer = OPERATIONS.Linear(320, 96, bias=False, dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    layer.lora = build_patches("w.weight", patches, weight.shape, torch.device("cpu"),
                               torch.float32, branch=False)
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_BYTES", 20 * 320 * 4)
    rows = []
    calculate = comfy.lora.calculate_weight
    monkeypatch.setattr(comfy.lora, "calculate_weight",
                        lambda p, w, *a, **k: rows.append(len(w)) or calculate(p, w, *a, **k))
    input = torch.randn(2, 320)
    merged = calculate(patches, dense.clone(), "w.weight")
    assert relative(layer(input), torch.nn.functional.linear(input, merged)) < 1e-6
    expected = [20, 20, 20, 20, 16] if kind in ("lora", "locon", "loha", "diff", "set") else [96]
    assert rows == expected
