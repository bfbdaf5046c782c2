"""Adapters that the host fails to compute are found when they are built, and not at every run."""
import logging

import pytest
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from patched_layers import value_of
from patched_models import KINDS, adapter, flux_file, flux_pair, lora_for

from featherweight.loaders.lora.compatibility import check_lora
from featherweight.ops.patches.adapters import shape_mismatch, shape_of
from featherweight.ops.patches.layer_patches import build_patches
from featherweight.ops.patches.patch_trial import trial_error

pytestmark = pytest.mark.usefixtures("no_model_outlives_its_tests")


@pytest.mark.parametrize(("value", "shape"), [
    (("diff", (torch.ones(4, 3, 2, 2),)), (4, 12)),
    (("set", (torch.ones(5),)), (5, 1)),
    ((torch.ones(2, 7),), (2, 7)),
    (("fooocus", (torch.ones(2, 7), 0.0, 1.0)), (None, None)),
])
def test_a_value_that_is_no_adapter_has_the_shape_of_its_tensor(value, shape):
    assert shape_of(value) == shape


def without(part, tensors):
    return {name: value for name, value in tensors.items() if part not in name}


def rand(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


CANNOT = "this ComfyUI cannot compute it ("
OF_WEIGHT = "it is made for a weight of {}, not of {}"
PAIR, FACTORS = rand(2, 32), {"lora_up.weight": rand(32, 2), "lora_down.weight": rand(2, 32)}
# what -> value, shape of the weight, words
BROKEN = {
    "BOFT without an alpha": (
        value_of(without("alpha", adapter("boft", rand(32, 32), 0))), (32, 32),
        (CANNOT, "NoneType")),
    # in the host, a Tucker core works only for kernels of two dimensions
    "LoKr with a core of one dimension": (value_of({
        "lokr_w1": rand(2, 2), "lokr_w2_a": rand(4, 16), "lokr_w2_b": rand(4, 16),
        "lokr_t2": rand(4, 4, 3)}), (32, 32, 3), (CANNOT, "einsum")),
    "half a LoKr": (value_of(without("w2_b", adapter("lokr", rand(32, 32), 0))), (32, 32),
                    ("its factors do not fit each other",)),
    "DoRA of another length": (
        value_of(FACTORS | {"dora_scale": rand(31, 1)}), (32, 32), (CANNOT, "31")),
    "DoRA of more values than rows": (
        value_of(FACTORS | {"dora_scale": rand(4096, 1)}), (32, 32),
        (CANNOT, "its dora_scale has 4,096 values")),
    "a LoRA for another shape": (
        LoRAAdapter(set(), (rand(8, 2), rand(2, 12), None, None, None, None)), (8, 6),
        ("which is 8 x 6:", OF_WEIGHT.format("8 x 12", "8 x 6"))),
    "a merge with another shape": (
        [(torch.ones(8, 12), lambda tensor, inplace: tensor)], (8, 6),
        (OF_WEIGHT.format("8 x 12", "8 x 6"),)),
    "a model of another shape as a LoRA": (
        ("model_as_lora", (torch.ones(8, 12),)), (8, 6), (OF_WEIGHT.format("8 x 12", "8 x 6"),)),
} | {f"{kind} of another shape, as many values": (
    value, (4, 4), (OF_WEIGHT.format("4 x 4 x 1 x 1", "4 x 4"),)) for kind, value in (
        ("a tensor", (torch.ones(4, 4, 1, 1),)), ("diff", ("diff", (torch.ones(4, 4, 1, 1),))),
        ("set", ("set", (torch.ones(4, 4, 1, 1),))))}


@pytest.mark.parametrize(("value", "shape", "words"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_computed_is_left_out_in_one_sentence(value, shape, words, caplog):
    with caplog.at_level(logging.WARNING):
        built = build_patches("w.weight", [(1.0, value, 1.0, None, None)], torch.Size(shape),
                              torch.device("cpu"), torch.float32,
                              original_weights={"w.weight": [(torch.ones(shape), None)]})
    (record,) = caplog.records
    message = record.getMessage()
    assert built is None and "\n" not in message
    assert all(word in message for word in ("left out of w.weight", *words)), message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 32), (64, 32, 3, 3)], ids=str)
def test_what_the_host_can_compute_passes(kind, shape):
    value = value_of(adapter(kind, rand(*shape), 1))
    assert trial_error(value, shape) is None and shape_mismatch(value, torch.Size(shape)) is None


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_a_bound_on_a_rotation_needs_no_values(kind, monkeypatch):
    def reject(*args, **kwargs):
        raise AssertionError("tried with values")

    tensors = adapter(kind, rand(64, 32), 1) | {"alpha": torch.tensor(0.01)}
    monkeypatch.setattr(torch, "zeros", reject)
    assert trial_error(value_of(tensors), (64, 32)) is None


class Future(WeightAdapterBase):
    """An adapter that reads the values of a weight, and logs."""

    name, loaded_keys, weights = "future", set(), ()

    def calculate_weight(self, weight, *args):
        logging.getLogger("another").warning("heard")
        return weight + 1 if weight.sum().item() == 0 else weight


def test_an_adapter_that_reads_values_is_tried_with_some_and_its_log_is_shown(caplog):
    assert trial_error(Future(), (4, 4)) is None and "heard" in caplog.text


def test_a_report_tells_what_a_broken_adapter_would_change():
    values = {name: value for name, value in flux_file("Q8_0")[1].items() if "blocks" in name}
    report = check_lora(flux_pair("Q8_0")[0], None, without("alpha", lora_for(values, "boft")))
    assert report.fits == "yes" and "changed in another way" in report.load_lora
