"""Plans: types for one type or a size, never above it, and what people are shown."""
import json
import random
import re

from devtools.measure.model_sizes import MODELS

import gguf
import numpy as np
import pytest
from planned_types import signal_to_error

from featherweight.loaders.families import rules_for
from featherweight.loaders.packing.planning.choose_types import choose_types
from featherweight.loaders.packing.planning.for_device import GRADES
from featherweight.loaders.packing.planning.plan import (
    Plan,
    PlanError,
    bytes_as_good_as,
    plan_for_size,
    plan_for_type,
    relative_error,
    types_for,
)
from featherweight.ops.packing.pack_types import TYPES


def random_case(seed, tensors=5, sizes_up_to=300):
    """costs, sizes: as a real model's, larger types being cheaper, in a random measure."""
    rng = random.Random(seed)
    costs, sizes = {}, {}
    for index in range(tensors):
        kinds = "abcd"[:rng.randint(1, 4)]
        spent = sorted(rng.sample(range(1, sizes_up_to), len(kinds)))
        worth = sorted((rng.expovariate(1) for _ in kinds), reverse=True)
        sizes[f"t{index}"], costs[f"t{index}"] = dict(zip(kinds, spent)), dict(zip(kinds, worth))
    return costs, sizes


def total(table, chosen):
    return sum(table[name][kind] for name, kind in chosen.items())


def least_cost(costs, sizes, budget) -> float:
    """Of all plans within a budget, by dynamic programming over its bytes."""
    best = np.zeros(budget + 1)
    for name, kinds in costs.items():
        sums = np.full((len(kinds), budget + 1), np.inf)
        for row, (kind, cost) in zip(sums, kinds.items()):
            size = sizes[name][kind]
            row[size:] = best[:budget + 1 - size] + cost
        best = sums.min(0)
    return best[-1]


@pytest.mark.parametrize("tensors", [5, 40, 300])
@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.7, 0.98, 1, 1.1])
def test_at_most_one_step_of_a_tensor_is_missed_of_the_best_plan(part, tensors):
    costs, sizes = random_case(tensors + int(100 * part), tensors, sizes_up_to=60)
    least, most = (sum(kind(of_types.values()) for of_types in sizes.values())
                   for kind in (min, max))
    budget = int(least + (most - least) * part)
    chosen, best = choose_types(costs, sizes, budget), least_cost(costs, sizes, budget)
    assert total(sizes, chosen) <= budget
    largest_step = max(max(of_types.values()) - min(of_types.values())
                       for of_types in costs.values())
    assert best - 1e-9 <= total(costs, chosen) <= best + (0 < part < 1) * largest_step + 1e-9
    if tensors == 300:
        assert total(costs, chosen) <= best * 1.02 + 0.01


def test_without_a_measurement_the_next_larger_type_goes_to_the_last_blocks(shapes):
    rules = rules_for(shapes)
    one = plan_for_type(shapes, "Q4_K", rules)
    next_larger = GRADES[GRADES.index("Q4_K") - 1]
    larger = plan_for_type(shapes, next_larger, rules)
    size = (one.nbytes(shapes) + larger.nbytes(shapes)) // 2
    plan = plan_for_size(shapes, size, rules)
    changed = [name for name in shapes if one.types[name] != larger.types[name]]
    assert plan.nbytes(shapes) > 0.99 * size
    if "Q5_0" not in one.types.values():
        assert {plan.types[name] for name in changed} == {"Q4_K", next_larger}
        blocks = [name for name in changed if "blocks.0." in name]
        assert {plan.types[name] for name in blocks[:1]} <= {"Q4_K"}
    assert signal_to_error(plan.types, shapes) > signal_to_error(one.types, shapes)
    exact = plan_for_size(shapes, one.nbytes(shapes), rules)
    assert exact.types == one.types


@pytest.mark.parametrize("odd", ["²", "9" * 5000])
def test_the_last_block_is_that_with_the_largest_number(odd):
    shapes = {f"double_blocks.{number}.img_mlp.0.weight": (512, 512) for number in (10, 2, 9)}
    shapes[f"a{odd}.0.weight"] = (512, 512)  # a name of a stranger
    rules = rules_for(shapes)
    budget = plan_for_type(shapes, "Q4_K", rules).nbytes(shapes) + 512 * 512 // 8
    types = plan_for_size(shapes, budget, rules).types
    assert types["double_blocks.10.img_mlp.0.weight"] == "Q5_K"
    assert types["double_blocks.9.img_mlp.0.weight"] == "Q4_K"


def test_the_size_as_good_as_a_type_is_that_of_the_type(shapes):
    rules = rules_for(shapes)
    for type_name in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0"):
        plan = plan_for_type(shapes, type_name, rules)
        assert bytes_as_good_as(type_name, shapes, rules) <= plan.nbytes(shapes)
    costs = {name: {"Q3_K": 10.0 ** -(index % 4)} for index, name in enumerate(shapes)}
    measured = bytes_as_good_as("Q4_K", shapes, rules, costs)
    assert measured < 0.97 * bytes_as_good_as("Q4_K", shapes, rules)
    stored = {name: 1 for name, shape in shapes.items() if rules.may_be_packed(name, shape)}
    assert bytes_as_good_as("Q4_K", shapes, rules, packed=stored) == least_bytes(
        {name: shape for name, shape in shapes.items() if name not in stored}, rules) + len(stored)


REAL = [
    model for model in MODELS
    if model.name.startswith(("Flux.1", "SD3.5 Large", "SDXL", "Wan 2.1 1.3B", "Z-Image", "T5"))
]


@pytest.fixture(scope="module", params=REAL, ids=lambda model: model.name)
def shapes(request):
    return request.param.shapes()


@pytest.mark.parametrize("type_name", ["Q2_K", "Q4_K", "Q8_0"])
def test_a_plan_for_a_size_is_hardly_below_it_and_every_type_divides_the_rows(shapes, type_name):
    family = rules_for(shapes)
    budget = plan_for_type(shapes, type_name, family).nbytes(shapes) + 1_000_000
    plan = plan_for_size(shapes, budget, family)
    assert 0.995 * budget <= plan.nbytes(shapes) <= budget
    assert list(plan.types) == list(shapes)
    for name, kind in plan.types.items():
        if kind not in ("F32", "F16", "BF16"):
            assert shapes[name][-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0


def least_bytes(shapes, family) -> int:
    """Bytes of all tensors with the smallest type wherever one may be packed."""
    with pytest.raises(PlanError) as refused:
        plan_for_size(shapes, 0, family)
    return refused.value.short_by


def test_a_plan_holds_the_same_parts_exact_whatever_it_is_for(shapes):
    family = rules_for(shapes)
    packed = {name for name, shape in shapes.items() if family.may_be_packed(name, shape)}
    for plan in (plan_for_type(shapes, "Q4_K", family),
                 plan_for_size(shapes,
                               least_bytes(shapes, family) * 11 // 10, family)):
        assert {
            name for name, kind in plan.types.items() if kind not in ("F32", "F16", "BF16")
        } == packed


def test_the_least_is_reached_and_named_below(shapes):
    family = rules_for(shapes)
    least = least_bytes(shapes, family)
    assert plan_for_size(shapes, least, family).nbytes(shapes) == least
    with pytest.raises(PlanError,
                       match=r"it takes [\d.]+ [GM]B\. Ask for that much or more\.$") as refused:
        plan_for_size(shapes, least - 1, family)
    number, unit = re.search(r"takes ([\d.]+) ([GM])B", str(refused.value)).groups()
    named = round(float(number) * {"G": 1e9, "M": 1e6}[unit])
    assert least <= named <= least * 1.01


SMALL = {
    f"double_blocks.{index}.img_mlp.{part}.weight": (512, 512)
    for index in range(4)
    for part in (0, 2)
} | {"double_blocks.0.img_attn.norm.key_norm.weight": (64,), "img_in.weight": (512, 64)}


def test_a_measured_tensor_that_moves_the_output_gets_the_larger_type():
    family = rules_for(SMALL)
    budget = plan_for_type(SMALL, "Q4_K", family).nbytes(SMALL)
    moving = "double_blocks.2.img_mlp.0.weight"
    costs = {name: {"Q3_K": 1.0 if name == moving else 1e-3} for name in SMALL if "mlp" in name}
    plan = plan_for_size(SMALL, budget, family, costs)
    others = {
        TYPES[kind].signal_to_error for name, kind in plan.types.items()
        if "mlp" in name and name != moving
    }
    assert TYPES[plan.types[moving]].signal_to_error > max(others)


def test_noise_of_a_measurement_never_makes_a_larger_type_dearer():
    costs = {
        name: {"Q3_K": 1e-3, "Q4_K": 1e-4, "Q8_0": 2e-4, "Q6_K": float("nan")} for name in SMALL
        if "mlp" in name
    }
    family = rules_for(SMALL)
    roomy = sum(512 * 512 * 2 for _ in costs) + 10**6
    plan = plan_for_size(SMALL, roomy, family, costs)
    assert {plan.types[name] for name in costs} == {"BF16"}
    budget = plan_for_type(SMALL, "Q8_0", family).nbytes(SMALL)
    plan = plan_for_size(SMALL, budget, family, costs)
    assert plan.nbytes(SMALL) <= budget
    assert all(relative_error(plan.types[name]) < relative_error("Q4_K") for name in costs)
    # no matrix becomes exact any more, which alone would gain by so noisy a measurement
    exact = min(TYPES["BF16"].nbytes(SMALL[name]) - TYPES[plan.types[name]].nbytes(SMALL[name])
                for name in costs if plan.types[name] != "BF16")
    assert exact > budget - plan.nbytes(SMALL)


def test_nf4_packs_matrices_of_blocks_and_no_table():
    shapes = {
        "encoder.block.0.layer.0.SelfAttention.q.weight": (512, 512), "shared.weight": (4096, 512)
    }
    family = rules_for(shapes)
    assert plan_for_type(shapes, "NF4", family).types == dict(zip(shapes, ("NF4", "BF16")))
    assert plan_for_type(shapes, "Q4_K", family).types == dict(zip(shapes, ("Q4_K", "Q4_K")))


def test_each_tensor_keeps_the_16_bit_type_of_its_source():
    plan = plan_for_type(SMALL, "Q4_K", rules_for(SMALL), halves={"img_in.weight": "F16"})
    assert plan.types["img_in.weight"] == "F16"


def test_larger_candidates_lose_less():
    for shape in ((8, 512), (8, 96), (8, 100)):
        losses = [relative_error(kind) for kind in (*types_for(shape), "BF16")]
        assert losses == sorted(losses, reverse=True)
    assert types_for((8, 100)) == []


def test_the_text_counts_types_and_bytes():
    plan = Plan({"a": "Q8_0", "b": "Q8_0", "c": "F32"})
    shapes = {"a": (1000, 512), "b": (1000, 512), "c": (512,)}
    assert plan.text(shapes).splitlines() == [
        "Q8_0: 2 tensors, 1.09 MB (99.8%)", "F32: 1 tensor, 2.05 KB (0.2%)"]
    assert plan.shares(shapes) == "Q8_0 99.8%, F32 0.2%"


def test_a_plan_comes_back_from_metadata():
    plan = Plan({"a": "Q8_0", "b": "Q8_0", "c": "F32"})
    assert Plan.from_json(plan.json()) == plan
    assert json.loads(plan.json())["types"]["Q8_0"] == ["a", "b"]
    nested = '{"types": ' + "[" * 100_000
    for text in ("{", "[]", "{}", '{"types": 3}', '{"types": {"Q8_0": 3}}', nested):
        with pytest.raises(PlanError, match="not a plan of types"):
            Plan.from_json(text)
