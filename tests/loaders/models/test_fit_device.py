"""*fit this GPU*: what fits a device's whole memory, what the node says of it, and the same weights
where the choice is fixed. (On GPUs of several sizes: `test_fit_on_gpus.py`.)"""
import functools
import pickle
import re

from devtools.measure import model_sizes

import comfy.model_management
import pytest
import torch
from checkpoint_parts import MODEL, stable_diffusion
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from patched_models import flux_file, folder, tiny_flux
from planned_types import signal_to_error
from recipe_process import digest
from safetensors.torch import save_file

from featherweight.loaders.byte_sizes import size_text
from featherweight.loaders.families import rules_for
from featherweight.loaders.files.container import WeightFileError
from featherweight.loaders.inspect.model_summary import memory_summary
from featherweight.loaders.inspect.requirements import best_types
from featherweight.loaders.models import fit_device, pack_on_load
from featherweight.loaders.models.checkpoint import load_checkpoint
from featherweight.loaders.models.diffusion import load_diffusion_model
from featherweight.loaders.models.fit_device import FIT, fit_text
from featherweight.loaders.models.pack_on_load import size_of_target, size_target
from featherweight.loaders.models.text_encoder import load_text_encoder
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
from featherweight.loaders.packing.planning import fit
from featherweight.loaders.packing.planning.fit import (
    GIB,
    Choice,
    Memory,
    Weights,
    choose,
    step_memory,
    workspace_bytes,
)
from featherweight.loaders.packing.planning.plan import (
    AS_STORED,
    plan_for_size,
    plan_for_type,
    relative_error,
)
from featherweight.nodes.load_diffusion_model import MIX, NO_CHANGE, packed_type

pytestmark = pytest.mark.usefixtures("small_models")

REAL = [model for model in model_sizes.MODELS if model.config and step_memory(model.config())]
STEP = 1000
UNPLANNED = 4000  # bytes at most of a small model's tensors that are in no file
FLUX_BYTES = 2 * sum(values.numel() for values in tiny_flux().values())


NAMES_OF_ENCODERS = ("clip-l", "t5-xxl of transformers")


@functools.cache
def flux_in_bfloat16() -> str:
    path = f"{folder().name}/bf16 to fit.safetensors"
    save_file({name: values.bfloat16() for name, values in tiny_flux().items()}, path)
    return path


@pytest.fixture
def room(monkeypatch):
    """Function that gives every device this many bytes for weights."""
    def give(nbytes: float, **attributes):
        monkeypatch.setattr(fit, "STEP", STEP)
        monkeypatch.setattr(Memory, "for_model", lambda *_: int(nbytes))
        monkeypatch.setattr(Memory, "for_encoder", lambda *_: int(nbytes))
        memory = Memory(12, **attributes)
        monkeypatch.setattr(Memory, "of", classmethod(lambda cls, device: memory))
    return give


# --- what is chosen ---


@pytest.mark.parametrize(("total", "gib"), [
    (12 * GIB, 12), (11.76 * GIB, 12), (11.74 * GIB, 11), (23.99 * GIB, 24), (22.49 * GIB, 22)])
def test_memory_counts_in_whole_gib_of_which_drivers_may_keep_a_quarter(total, gib, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: total)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", None)  # plays no part
    assert Memory.of(torch.device("cuda:0")) == Memory(gib)
    assert Memory.of(torch.device("cpu")) == Memory(gib, is_shared=True)


def test_what_the_owner_reserves_is_left_free(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 8 * GIB)
    plain = Memory.of(torch.device("cuda:0"))
    monkeypatch.setattr(fit.args, "reserve_vram", 2.0)
    reserving = Memory.of(torch.device("cuda:0"))
    assert plain.for_model(GIB) - reserving.for_model(GIB) == pytest.approx(1.6 * GIB, abs=2)


@pytest.mark.parametrize("model", REAL, ids=lambda model: model.name)
def test_a_larger_card_never_has_worse_weights_and_none_worse_than_the_table_says(model):
    shapes, (step, _) = model.shapes(), step_memory(model.config())
    cards = (6, 8, 10, 12, 16, 24, 32)
    table = best_types(shapes, cards, step)
    nbytes = model_sizes.bytes_of(shapes, "BF16")
    earlier = 0.0
    for gib in cards:
        memory = Memory(gib)
        room = memory.for_model(step, workspace_bytes(shapes))
        weights = [Weights(shapes, nbytes, {})]
        chosen = choose(weights, room, memory.for_model(step))
        assert (chosen.missing > 0) == (table[gib] == "") == (chosen.target == "Q4_K")
        assert (chosen.target == "") == (table[gib] == "BF16")
        if isinstance(chosen.target, int):
            plan = plan_for_size(shapes, chosen.target, rules_for(shapes))
            assert room - fit.STEP < chosen.target <= room
            assert 0.98 * room < plan.nbytes(shapes) <= room
            decibels = signal_to_error(plan.types, shapes)
            of_table = plan_for_type(shapes, table[gib], rules_for(shapes)).types
            # whose costs count the place of a layer too
            assert decibels >= max(earlier, signal_to_error(of_table, shapes)) - 1.5
            earlier = decibels
        fast = choose(weights, room, memory.for_model(step), multiplies_int8=True)
        fits = plan_for_type(shapes, fit.FAST_TYPE, rules_for(shapes)).nbytes(shapes) <= room
        assert (fast.target == fit.FAST_TYPE) == (fits and chosen.target != "")


def test_packed_files_are_left_as_they_are_where_they_fit_and_never_become_int8(monkeypatch):
    monkeypatch.setattr(fit, "STEP", STEP)
    shapes = {f"double_blocks.{index}.img_mlp.0.weight": (1024, 256) for index in range(9)}
    packed = dict.fromkeys(shapes, 1024 * 144)
    nbytes = sum(packed.values())
    assert choose([Weights(shapes, nbytes, packed)], nbytes, 0, True) == Choice("", nbytes)
    packed = dict.fromkeys(shapes, 1024 * 400)
    nbytes = 9 * 1024 * 300
    for stored, target in ((packed, nbytes // STEP * STEP), ({}, fit.FAST_TYPE)):
        weights = [Weights(shapes, nbytes + 1, stored)]
        assert choose(weights, nbytes, nbytes, True).target == target


@pytest.mark.parametrize("stored", [100, 144, 180, 300])
def test_packed_weights_stay_or_become_smaller(stored):
    shapes = {f"double_blocks.{index}.img_mlp.0.weight": (1024, 256) for index in range(9)}
    packed = dict.fromkeys(shapes, 1024 * stored)
    whole = plan_for_size(shapes, 9 * 1024 * stored, rules_for(shapes), packed=packed)
    assert set(whole.types.values()) == {AS_STORED}
    if stored > 84:  # a block of Q2_K
        less = plan_for_size(shapes, 9 * 1024 * stored - 1, rules_for(shapes), packed=packed)
        types = list(less.types.values())
        assert types.count(AS_STORED) == 8 and relative_error(AS_STORED) == 0


# --- loaded ---


@pytest.mark.parametrize(("is_shared", "memory"), [
    (False, "a GPU of 12 GB"), (True, "12 GB of main memory")])
def test_a_model_that_fits_is_left_to_the_host(is_shared, memory, room):
    room(FLUX_BYTES, is_shared=is_shared)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    assert fit_text(model) == (f"The file fits unchanged: its weights may take"
                               f" {size_text(FLUX_BYTES)} of {memory}.")
    assert digest(model) == digest(load_diffusion_model(flux_in_bfloat16()))


@pytest.mark.parametrize("share", [0.3, 0.45, 0.7, 0.99])
def test_a_size_makes_the_same_weights_as_the_card_that_it_was_chosen_for(share, room):
    room(FLUX_BYTES * share)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    size = int(FLUX_BYTES * share) // STEP * STEP
    assert 0.9 * size < model.model_size() <= size + UNPLANNED
    assert re.search(r"packed from BF16 in \d+ s, loss: [a-z ]+ \([\d.]+ % of the weights\)$",
                     memory_summary(model))
    assert re.fullmatch(
        r"Packed for a GPU of 12 GB, which leaves \d+\.\d MB for the weights\. mix for a size,"
        r" \S+ GB, at pack to gives the same on every device\.", fit_text(model))
    fixed = load_diffusion_model(flux_in_bfloat16(), pack_to=packed_type(MIX, size / 1e9))
    assert digest(fixed) == digest(model) and fit_text(fixed) == ""
    room(FLUX_BYTES)  # another device
    again, _ = model.cached_patcher_init
    assert digest(pickle.loads(pickle.dumps(again))()) == digest(
        load_diffusion_model(flux_in_bfloat16()))


def test_a_model_that_is_too_large_is_packed_and_the_text_says_what_it_lacks(room):
    room(FLUX_BYTES * 0.1)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    assert digest(model) == digest(load_diffusion_model(flux_in_bfloat16(), pack_to="Q4_K"))
    least, lack = re.search(
        r"take (\S+) MB, (\S+) MB more than there is for them on a GPU of 12 GB, even with the"
        r" smallest types\. So they are Q4_K, and .* copied in each step", fit_text(model)).groups()
    assert float(least) - float(lack) == pytest.approx(FLUX_BYTES / 1e7, abs=0.02)


def test_memory_that_the_system_uses_too_is_not_exceeded(room):
    room(FLUX_BYTES * 0.1, is_shared=True)
    with pytest.raises(WeightFileError, match=r"^bf16 to fit.safetensors: the weights take .* more"
                       r" than there is for them on 12 GB of main memory, even with the smallest"
                       r" types. Use a smaller model, or choose a type"):
        load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)


def test_where_comfyui_multiplies_int8_it_is_chosen(room, monkeypatch):
    room(FLUX_BYTES * 0.7)
    monkeypatch.setattr(fit_device, "FAST_FORMAT", "a format that this pack does not compute")
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    assert "int8_convrot at pack to gives the same on every device." in fit_text(model)
    assert digest(model) == digest(load_diffusion_model(flux_in_bfloat16(), pack_to="int8_convrot"))


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_a_packed_file_is_left_as_it_is_or_packed_further(type_name, room):
    path, _ = flux_file(type_name)
    nbytes = load_diffusion_model(path).model_size()
    room(nbytes + 5000)
    model = load_diffusion_model(path, pack_to=FIT)
    assert "fits unchanged" in fit_text(model)
    assert digest(model) == digest(load_diffusion_model(path))
    room(0.8 * nbytes)
    smaller = load_diffusion_model(path, pack_to=FIT)
    assert smaller.model_size() <= 0.8 * nbytes + UNPLANNED
    assert "packed from" in memory_summary(smaller)
    assert type_name in memory_summary(smaller)  # most is as it was


def test_of_a_checkpoint_the_diffusion_model_alone_is_packed(room, tmp_path):
    weights = stable_diffusion()
    path = tmp_path / "checkpoint.safetensors"
    save_file({name: values.half().contiguous() for name, values in weights.items()}, path)
    nbytes = 2 * sum(values.numel() for name, values in weights.items() if name.startswith(MODEL))
    room(nbytes)
    model, clip, _ = load_checkpoint(str(path), pack_to=FIT)
    assert fit_text(model).startswith("The file fits unchanged: its weights may take")
    assert fit_text(clip.patcher) == ""
    room(0.8 * nbytes)
    model, clip, _ = load_checkpoint(str(path), pack_to=FIT)
    assert model.model_size() <= 0.8 * nbytes + UNPLANNED
    assert "packed from F16" in memory_summary(model)
    assert "packed" not in memory_summary(clip.patcher)
    assert load_checkpoint(str(path), output_model=False, pack_to=FIT)[1] is not None


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_text_encoders_of_one_clip_share_the_room(share, room, tmp_path):
    paths, nbytes = [], 0
    for name in NAMES_OF_ENCODERS:
        encoder = ENCODERS[name]
        weights = {key: values.bfloat16() for key, values in encoder_weights(encoder).items()}
        weights |= {key: torch.zeros(shape, dtype=torch.bfloat16)
                    for key, shape in encoder.markers.items() if key not in weights}
        nbytes += sum(values.nbytes for values in weights.values())
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file(weights | dict(encoder.extra), paths[-1])
    room(share * nbytes + 100_000)
    options = {key: value for name in reversed(NAMES_OF_ENCODERS)
               for key, value in ENCODERS[name].model_options.items()}
    clip = load_text_encoder(paths, "sd3", pack_to=FIT, model_options=options)
    assert ("fits unchanged" in fit_text(clip.patcher)) == (share == 1)
    assert ("packed from BF16" in memory_summary(clip.patcher)) == (share < 1)
    if share < 1:
        fixed = size_target((int(share * nbytes) + 100_000) // STEP * STEP)
        again = load_text_encoder(paths, "sd3", pack_to=fixed, model_options=options)
        assert digest(again.patcher) == digest(clip.patcher)


def test_the_measurement_of_the_model_decides_where_bits_go(monkeypatch):
    target = size_target(int(FLUX_BYTES * 0.35))
    plain = load_diffusion_model(flux_in_bfloat16(), pack_to=target)
    shapes = {name: tuple(values.shape) for name, values in tiny_flux().items()
              if values.ndim == 2 and "_blocks." in name}
    measured = "double_blocks.0.img_mlp.0.weight"
    costs = {name: {"Q4_K": 1.0 if name == measured else 1e-6} for name in shapes}
    path = f"{folder().name}/bf16 to fit_00002_.sensitivity"
    Sensitivity(costs, shapes).save(path)
    monkeypatch.setattr(pack_on_load, "sensitivity_of", lambda model_path: path)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=target)
    weight = model.model.diffusion_model.get_parameter(measured)
    assert weight.nbytes > plain.model.diffusion_model.get_parameter(measured).nbytes
    assert model.model_size() <= size_of_target(target) + UNPLANNED
    # what the weights lose says nothing of the image then
    assert "loss: " in memory_summary(plain) and "loss: " not in memory_summary(model)


def test_a_size_that_is_too_small_is_refused_in_a_sentence():
    with pytest.raises(WeightFileError, match=r"^bf16 to fit.safetensors: A size of 1.00 MB is too"
                       r" small for this model: .* Ask for that much or more"):
        load_diffusion_model(flux_in_bfloat16(), pack_to="0.001 GB")
    for size in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^size in GB is .*; expected how large the weights"):
            packed_type(MIX, size)
    assert packed_type(NO_CHANGE, 3.0) is None and packed_type(FIT, 3.0) == FIT
    assert size_of_target(packed_type(MIX, 8.93)) == 8_930_000_000
    assert size_of_target("Q4_K") is None
