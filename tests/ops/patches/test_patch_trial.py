"""Adapters that the host fails to compute are found when they are built, and not at every run."""
import logging

import comfy.lora
import pytest
import torch
from comfy.weight_adapter import WeightAdapterBase
from patched_models import (
    KINDS,
    adapter,
    flux_file,
    flux_pair,
    lora_for,
    patched,
    run,
)

from featherweight.loaders.lora.compatibility import check_lora
from featherweight.ops.patches.adapters import shape_of
from featherweight.ops.patches.layer_patches import build_patches
from featherweight.ops.patches.patch_trial import trial_error

LAYER = "lora_unet_double_blocks_0_img_attn_proj"


pytestmark = pytest.mark.usefixtures("no_model_outlives_its_tests")


@pytest.mark.parametrize(("value", "shape"), [
    (("diff", (torch.ones(4, 3, 2, 2),)), (4, 12)),
    (("set", (torch.ones(5),)), (5, 1)),
    ((torch.ones(2, 7),), (2, 7)),
    (("fooocus", (torch.ones(2, 7), 0.0, 1.0)), (None, None)),
])
def test_a_value_that_is_no_adapter_has_the_shape_of_its_tensor(value, shape):
    assert shape_of(value) == shape


def without_alpha(lora):
    return {name: value for name, value in lora.items() if not name.endswith("alpha")}


def value_of(tensors, key="w.weight"):
    lora = {f"x.{end}": tensor for end, tensor in tensors.items()}
    return comfy.lora.load_lora(lora, {"x": key}, log_missing=False)[key]


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


# In the host, a Tucker core works only for kernels of two dimensions.
LOKR_1D = {"lokr_w1": rand(2, 2), "lokr_w2_a": rand(4, 16), "lokr_w2_b": rand(4, 16),
           "lokr_t2": rand(4, 4, 3)}
BROKEN = {
    "BOFT without an alpha": (without_alpha(adapter("boft", rand(32, 32), 0)), (32, 32),
                              "NoneType"),
    "LoKr with a core of one dimension": (LOKR_1D, (32, 32, 3), "einsum"),
    "DoRA of another length": ({"lora_up.weight": rand(32, 2), "lora_down.weight": rand(2, 32),
                                "dora_scale": rand(31, 1)}, (32, 32), "31"),
    "DoRA of more values than rows": (
        {"lora_up.weight": rand(32, 2), "lora_down.weight": rand(2, 32),
         "dora_scale": rand(4096, 1)}, (32, 32), "its dora_scale has 4,096 values"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_the_host_cannot_compute_is_left_out_in_one_sentence(case, caplog):
    tensors, shape, cause = BROKEN[case]
    with caplog.at_level(logging.WARNING):
        built = build_patches("w.weight", [(1.0, value_of(tensors), 1.0, None, None)],
                              torch.Size(shape), torch.device("cpu"), torch.float32)
    (record,) = caplog.records
    message = record.getMessage()
    assert built is None and cause in message and "\n" not in message
    assert "left out of w.weight" in message and "this ComfyUI cannot compute it (" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 32), (64, 32, 3, 3)], ids=str)
def test_what_the_host_can_compute_passes(kind, shape):
    assert trial_error(value_of(adapter(kind, rand(*shape), 1)), shape) is None


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_a_bound_on_a_rotation_needs_no_values(kind, monkeypatch):
    def reject(*args, **kwargs):
        raise AssertionError("tried with values")

    tensors = adapter(kind, rand(64, 32), 1) | {"alpha": torch.tensor(0.01)}
    monkeypatch.setattr(torch, "zeros", reject)
    assert trial_error(value_of(tensors), (64, 32)) is None


def test_an_adapter_that_reads_values_is_tried_with_some():
    class Future(WeightAdapterBase):
        name, loaded_keys, weights = "future", set(), ()

        def calculate_weight(self, weight, *args):
            return weight + 1 if weight.sum().item() == 0 else weight

    assert trial_error(Future(), (4, 4)) is None


def test_the_log_of_others_is_shown_during_a_trial(caplog):
    class Chatty(WeightAdapterBase):
        name, loaded_keys, weights = "chatty", set(), ()

        def calculate_weight(self, weight, *args):
            logging.getLogger("another").warning("heard")
            return weight

    assert trial_error(Chatty(), (4, 4)) is None and "heard" in caplog.text


def test_a_model_runs_without_a_broken_adapter_and_says_so_once(caplog):
    packed, _ = flux_pair("Q8_0")
    values = {name: value for name, value in flux_file("Q8_0")[1].items() if "blocks" in name}
    lora = without_alpha(lora_for(values, "boft"))
    without, patcher = run(packed), patched(packed, (lora, 1.0))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(patcher), without) and torch.equal(run(patcher), without)
    assert len(caplog.records) == sum(value.ndim > 1 for value in values.values())
    report = check_lora(packed, None, lora)  # whose own arithmetic can
    assert report.fits == "yes" and "changed in another way" in report.load_lora


@pytest.mark.parametrize("wrap", [
    lambda weight: [(weight, lambda tensor, inplace: tensor)],
    lambda weight: ("model_as_lora", (weight,)),
], ids=["merge", "model as a LoRA"])
def test_a_weight_of_another_models_shape_is_left_out(wrap, caplog):
    patches = [(0.5, wrap(torch.ones(8, 12)), 1.0, None, None)]
    built = build_patches("w.weight", patches, torch.Size((8, 6)), torch.device("cpu"),
                          torch.float32, original_weights={"w.weight": [(torch.ones(8, 6), None)]})
    assert built is None
    assert "it is made for a weight of 8 x 12, not of 8 x 6" in caplog.text
