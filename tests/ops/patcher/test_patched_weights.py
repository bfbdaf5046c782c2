"""The state dict of a packed model with LoRAs, in every way that other packs read one."""
import collections
import copy
import functools
import io
import pickle
import weakref

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from pack_api import QuantizedTensor, source_of_model
from patched_models import (
    broken,
    flux_file,
    flux_pair,
    forget_models,
    lora_for,
    packed_layers,
    patched,
    run,
)
from patcher_models import with_dense_parts

from featherweight.ops.patcher import PackedPatcher

pytestmark = pytest.mark.usefixtures("small_models")

PREFIX = "diffusion_model."


@pytest.fixture(autouse=True, scope="module")
def no_model_outlives_its_tests():
    yield
    weights_of_the_host.cache_clear()
    forget_models()


def with_lora(patcher, format_name):
    """A LoRA for every matrix and changes of norms and biases, which the host patches by itself."""
    values = flux_file(format_name)[1]
    return patched(patcher, (with_dense_parts(lora_for(values, "dora", seed=1), values), 0.8))


@functools.cache
def weights_of_the_host(format_name: str) -> dict[str, torch.Tensor]:
    """Weights of the host's dense model with the LoRA; shared by tests."""
    reference = with_lora(flux_pair(format_name)[1], format_name)
    run(reference)
    weights = {name: weight.clone() for name, weight in reference.model_state_dict(PREFIX).items()}
    comfy.model_management.unload_all_models()
    return weights


MODELS = [(name, loaded) for name in ("Q4_K", "float8_e4m3fn", "int8_tensorwise")
          for loaded in (False, True)]


@pytest.fixture(params=MODELS, ids=str)
def models(request):
    """(patcher of a packed model with a LoRA, weights of the host's dense model with it)"""
    format_name, loaded = request.param
    expected = weights_of_the_host(format_name)
    patcher = with_lora(flux_pair(format_name)[0], format_name)
    if loaded:
        run(patcher)
    return patcher, expected


def by_popitem(weights):
    return dict(weights.popitem() for _ in range(len(weights)))


def updated(weights):
    result = {}
    result.update(weights)
    return result


def through_torch(weights):
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def given(**weights):
    return weights


def merged_in_place(weights):
    weights |= {"another": torch.ones(1)}
    return {name: weight for name, weight in weights.items() if name != "another"}


READINGS = {
    "lookup": lambda weights: {name: weights[name] for name in weights},
    "lookup of keys": lambda weights: {name: weights[name] for name in list(weights.keys())},
    "get": lambda weights: {name: weights.get(name) for name in weights},
    "get with default": lambda weights: {name: weights.get(name, None) for name in weights},
    "items": lambda weights: {name: weight.detach().clone() for name, weight in weights.items()},
    "list of items": lambda weights: dict(list(weights.items())),
    "sorted items": lambda weights: dict(sorted(weights.items(), key=lambda item: item[0])),
    "values": lambda weights: dict(zip(weights, weights.values())),
    "copy": lambda weights: dict(weights.copy().items()),
    "copy.copy": lambda weights: dict(copy.copy(weights).items()),
    "deepcopy": copy.deepcopy,
    "pickle": lambda weights: pickle.loads(pickle.dumps(weights)),
    "torch.save": through_torch,
    "safetensors": lambda weights: safetensors.torch.load(
        safetensors.torch.save(weights, metadata={"format": "pt"})),
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "ChainMap": lambda weights: dict(collections.ChainMap({}, weights)),
    "two stars": lambda weights: {**weights},
    "keyword arguments": lambda weights: given(**weights),
    "or": lambda weights: dict((weights | {}).items()),
    "or from the right": lambda weights: {} | weights,
    "in-place or": merged_in_place,
    "update": updated,
    "pop": lambda weights: {name: weights.pop(name) for name in list(weights)},
    "popitem": by_popitem,
    "setdefault": lambda weights: {name: weights.setdefault(name, None) for name in weights},
    "reversed": lambda weights: {name: weights[name] for name in reversed(weights)},
    "state_dict_prefix_replace": lambda weights: comfy.utils.state_dict_prefix_replace(weights, {}),
}


# a reading calls methods of a dict, whose values one function makes: any of both formats will do
@pytest.mark.parametrize(("models", "reading"), [
    pytest.param(model, reading, id=f"{model}-{reading}") for reading in READINGS for model in (
        MODELS if reading in ("lookup", "pickle", "safetensors") else (MODELS[0], MODELS[3]))],
    indirect=["models"])
def test_every_reading_gives_dense_weights_with_their_patches(models, reading):
    patcher, expected = models
    weights = READINGS[reading](patcher.model_state_dict(PREFIX))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert not isinstance(weight, QuantizedTensor)
        assert weight.shape == expected[name].shape and weight.dtype == expected[name].dtype
        assert torch.allclose(weight.float(), expected[name].float(), rtol=1e-5, atol=1e-6), name


@pytest.fixture
def dequantized(monkeypatch):
    """Names of the weights that were dequantised."""
    names, read = [], PackedPatcher.patch_weight_to_device

    def counted(self, key, *args, **kwargs):
        names.append(key)
        return read(self, key, *args, **kwargs)

    monkeypatch.setattr(PackedPatcher, "patch_weight_to_device", counted)
    return names


def test_listing_counting_and_copying_dequantize_nothing(models, dequantized):
    weights = models[0].model_state_dict()
    names = list(weights)
    assert isinstance(weights, dict) and len(weights) == len(weights.keys()) == len(names)
    assert names[0] in weights and "another" not in weights and weights.get("another") is None
    assert weights.keys() & set(names) == set(names) == set(weights.keys())
    assert list(reversed(weights)) == names[::-1] and bool(weights)
    others = [weights.copy(), copy.copy(weights), weights | {"another": torch.ones(1)}]
    others[0]["another"] = torch.ones(1)
    del others[1][names[0]]
    assert [len(other) - len(weights) for other in others] == [1, -1, 1]
    others[0].clear()
    assert not dequantized


def test_going_over_the_items_dequantizes_one_at_a_time(models, dequantized):
    patcher, count = models[0], len(packed_layers(models[0]))
    alive = []
    for name, weight in patcher.model_state_dict().items():
        alive = [reference for reference in alive if reference() is not None]
        assert len(alive) < 2
        if name in dequantized:
            alive.append(weakref.ref(weight))
    assert count <= len(dequantized) == len(set(dequantized))


def test_what_was_put_in_is_what_is_read(models):
    weights = models[0].model_state_dict()
    name = next(name for name in weights if name.endswith("img_mlp.0.weight"))
    mine = weights[name] * 2
    weights[name] = mine
    weights["another"] = mine
    assert all(value is mine for value in (
        weights[name], weights.copy()[name], dict(weights)["another"]))
    del weights[name]
    assert name not in weights and name not in weights.copy()


# --- what other packs and the host's own nodes do with it ---


@pytest.fixture
def base(models):
    """The weights without the LoRA, as the models are read that packs compare: each loaded
    before."""
    run(models[0].parent)
    weights = {name: weight.float().clone()
               for name, weight in models[0].parent.model_state_dict(PREFIX).items()}
    comfy.model_management.unload_all_models()
    return weights


def test_a_lora_is_extracted_from_what_a_lora_has_changed(models, base):
    from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model
    from comfy_extras.nodes_model_merging import ModelSubtract

    patcher, expected = models
    difference, = ModelSubtract().merge(patcher, patcher.parent, 1.0)
    extracted = calc_lora_model(difference, 8, PREFIX, "", {}, LORAType.FULL_DIFF)
    names = [name for name, weight in base.items() if weight.ndim == 2]
    assert len(names) > 10
    for name in names:
        effect = expected[name].float() - base[name]
        weight = extracted[f"{name.removeprefix(PREFIX).removesuffix('.weight')}.diff"]
        assert (weight.float() - effect).norm() < 1e-3 * effect.norm()


# --- what the layers leave out ---


def merged_with_another(patcher):
    """A sum with a model without LoRAs, as the host's ModelMergeAdd makes it."""
    merged = flux_pair("Q4_K")[0].clone()
    for name, weight in patcher.get_key_patches(PREFIX).items():
        merged.add_patches({name: weight}, 1.0, 1.0)
    return merged


def packed_again(patcher):
    weights = source_of_model(patcher).weights.values()
    return {PREFIX + weight.name: weight.patched(0, weight.shape[0]) for weight in weights}


TAKEN = {
    "read": lambda patcher: dict(patcher.model_state_dict(PREFIX)),
    "saved": lambda patcher: {name: weight.to("cpu") for name, weight in
                              patcher.model_state_dict_for_saving().items()},
    "merged": lambda patcher: dict(merged_with_another(patcher).model_state_dict(PREFIX)),
    "packed": packed_again
}


@pytest.mark.parametrize("what", ["nan", "wrong rows"])
@pytest.mark.parametrize("taken", TAKEN)
def test_a_lora_that_is_left_out_of_pictures_is_left_out_of_the_weights(taken, what):
    values = {name: value for name, value in flux_file("Q4_K")[1].items()
              if name.startswith("double_blocks")}
    good, bad = lora_for(values), broken(lora_for(values, seed=1), what)
    packed, _ = flux_pair("Q4_K")
    expected = TAKEN[taken](patched(packed, (good, 0.8)))
    actual = TAKEN[taken](patched(packed, (good, 0.8), (bad, 1.0)))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
