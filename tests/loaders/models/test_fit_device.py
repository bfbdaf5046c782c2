"""*fit this GPU*: what fits a device's whole memory, what the node says of it, and the same weights
where the choice is fixed. (On GPUs of several sizes: `test_fit_on_gpus.py`.)"""
import functools
import math
import pickle
import random
import re
import types

from devtools.measure import model_sizes

import comfy.model_management
import pytest
import torch
from checkpoint_parts import MODEL, stable_diffusion
from encoders import ENCODERS
from encoders.encoder import random_weights as encoder_weights
from pack_api import (
    WeightFileError,
    is_packed,
    load_checkpoint,
    load_diffusion_model,
    load_text_encoder,
    memory_summary,
)
from patched_models import flux_file, folder, tiny_flux
from recipe_process import digest
from safetensors.torch import save_file

from featherweight.loaders.byte_sizes import size_text
from featherweight.loaders.comfyui.model_summary import format_name
from featherweight.loaders.families import rules_for
from featherweight.loaders.models import fit_device, pack_on_load
from featherweight.loaders.models.fit_device import FIT, copying_text, fit_text
from featherweight.loaders.models.placement import placed_text
from featherweight.loaders.packing.calibration.measure import usual_steps
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity
from featherweight.loaders.packing.layer_losses import measuring_advice
from featherweight.loaders.packing.planning import for_device
from featherweight.loaders.packing.planning.for_device import (
    GIB,
    Choice,
    Memory,
    Sizes,
    Weights,
    choose,
    step_memory,
    workspace_bytes,
)
from featherweight.loaders.packing.planning.plan import (
    ROUNDED_INPUTS,
    STAYS,
    plan_for_size,
    plan_for_type,
    relative_error,
)
from featherweight.nodes.load_diffusion_model import MIX, NO_CHANGE, packed_type
from featherweight.ops.patcher.residency import MemoryReport

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
        monkeypatch.setattr(for_device, "STEP", STEP)
        monkeypatch.setattr(Memory, "for_model", lambda *_, **__: int(nbytes))
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
    assert Memory.of(torch.device("cuda:0")) == Memory(gib, main_gib=gib)
    assert Memory.of(torch.device("cpu")) == Memory(gib, is_shared=True, main_gib=gib)


def test_what_the_owner_reserves_is_left_free(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 8 * GIB)
    plain = Memory.of(torch.device("cuda:0"))
    monkeypatch.setattr(for_device.args, "reserve_vram", 2.0)
    reserving = Memory.of(torch.device("cuda:0"))
    assert plain.for_model(GIB) - reserving.for_model(GIB) == pytest.approx(1.6 * GIB, abs=2)


@functools.cache
def sizes_of(name: str, is_measured: bool) -> Sizes:
    """Returns the sizes of a model in bfloat16; measured: with costs that differ a thousandfold."""
    model = next(model for model in REAL if model.name == name)
    shapes = model.shapes()
    rng, rules = random.Random(0), rules_for(shapes)
    costs = {key: {"Q4_K": 10 ** rng.uniform(-3, 0)} for key, shape in shapes.items()
             if rules.may_be_packed(key, shape)}
    nbytes = model_sizes.bytes_of(shapes, "BF16")
    return Sizes([Weights(shapes, nbytes, {}, costs if is_measured else None)])


@functools.cache
def quality(name: str, is_measured: bool, target: str | int) -> float:
    """Returns the dB of what was chosen, by the weights or by the measurement."""
    [weights] = sizes_of(name, is_measured).files
    rules = rules_for(weights.shapes)
    if isinstance(target, int):
        types = plan_for_size(weights.shapes, target, rules, weights.costs).types
    else:
        types = plan_for_type(weights.shapes, target or "BF16", rules).types
    units = {key: math.prod(weights.shapes[key]) for key in types}
    if weights.costs:
        units = {key: costs["Q4_K"] / relative_error("Q4_K")
                 for key, costs in weights.costs.items()}
    error = sum(unit * relative_error(types[key])
                * (ROUNDED_INPUTS if types[key] == for_device.FAST_TYPE else 1)
                for key, unit in units.items())
    return -10 * math.log10(error / sum(units.values()))


CARDS, RAM = (4, 6, 8, 10, 11, 12, 14, 16, 20, 24, 32), (8, 16, 32, 64)
GRID = [(model.name, is_measured, int8) for model in REAL for is_measured in (False, True)
        for int8 in (False, True)]
# of few tensors a plan by a measurement takes seconds
drawn = random.Random(79).sample(
    [case for case in GRID if not (case[1] and case[0].startswith(("Flux.2", "Z-Image")))], 6)


@pytest.mark.parametrize(("name", "is_measured", "int8"), [
    pytest.param(*case, marks=() if case in drawn else pytest.mark.heavy) for case in GRID])
def test_more_memory_of_either_kind_never_has_worse_weights(name, is_measured, int8):
    model = next(model for model in REAL if model.name == name)
    sizes, config = sizes_of(name, is_measured), model.config()
    step, workspace = step_memory(config)[0], workspace_bytes(model.shapes())
    decibels = {}
    for gib in CARDS:
        for main_gib in RAM:
            memory = Memory(gib, main_gib=main_gib)
            room, main = memory.for_model(step, workspace), memory.for_copying(config)
            chosen = choose(sizes, functools.partial(memory.for_model, step), int8, main)
            found = decibels[gib, main_gib] = quality(name, is_measured, chosen.target)
            if isinstance(chosen.target, int):
                assert chosen.target <= max(room, main, sizes.least)
                assert chosen.copied == max(0, chosen.target - room)
            floors = [quality(name, is_measured, sizes.as_good_as[each])
                      for each in ("Q4_K", "Q3_K")]
            assert bool(chosen.lack) == (found < floors[0] - 0.3)
            assert found > floors[0] - 0.3 or sizes.as_good_as["Q4_K"] > max(room, main)
            assert found > floors[1] - 0.3 or sizes.as_good_as["Q3_K"] > max(room, main)
            assert int8 or chosen.target != for_device.FAST_TYPE
            if int8 and chosen.target and chosen.target != for_device.FAST_TYPE:
                assert sizes.fast > room
    for (gib, main_gib), found in decibels.items():
        for larger in ((card, ram) for card in CARDS for ram in RAM
                       if card >= gib and ram >= main_gib):
            assert decibels[larger] > found - 0.3, (gib, main_gib, larger)


@pytest.mark.parametrize(("name", "gib", "grade", "copied"), [
    ("Flux.2 dev", 16, "Q4_K", 6.8), ("Flux.2 dev", 14, "Q4_K", 8.9),
    ("Qwen-Image, Qwen-Image-Edit", 10, "Q4_K", 3.4),
    ("Flux.1 dev, schnell, Kontext", 8, "Q4_K", 0.95),
    ("Flux.1 dev, schnell, Kontext", 12, "Q6_K", 0)])
def test_what_does_not_fit_is_copied_and_not_packed_below_q4_k(name, gib, grade, copied):
    model = next(model for model in REAL if model.name == name)
    memory, step = Memory(gib, main_gib=64), step_memory(model.config())[0]
    chosen = choose(sizes_of(name, False), functools.partial(memory.for_model, step),
                    main=memory.for_copying(model.config()))
    assert chosen.grade == grade and chosen.copied == pytest.approx(copied * 1e9, abs=5e7)


def test_both_experts_and_the_text_encoder_share_the_main_memory():
    configs = {model.name: model.config() for model in REAL}
    memory = Memory(8, main_gib=32)
    wan = memory.for_copying(configs["Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)"])
    assert 2 * wan + 0.6 * 5e9 == pytest.approx(0.6 * 32 * GIB, abs=4)
    assert memory.for_copying(configs["Wan 2.1 1.3B"]) == pytest.approx(2 * wan, abs=4)
    flux = memory.for_copying(configs["Flux.2 dev"])
    assert flux + 0.6 * 24e9 == pytest.approx(0.6 * 32 * GIB, abs=4)
    assert Memory(8, True, main_gib=32).for_copying(None) == 0


def card_of(name: str, major: int, minor: int, processors: int):
    return types.SimpleNamespace(name=name, major=major, minor=minor,
                                 multi_processor_count=processors)


@pytest.mark.parametrize(("card", "least", "most"), [
    (card_of("NVIDIA GeForce RTX 3070", 8, 6, 46), 0.005, 0.02),
    (card_of("NVIDIA GeForce RTX 4060", 8, 9, 24), 0.01, 0.04),
    (card_of("NVIDIA GeForce GTX 1080", 6, 1, 20), 0.002, 0.02)])
def test_the_longer_step_follows_from_the_generation_and_the_usual_link(card, least, most,
                                                                         monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    device = torch.device("cuda:0")
    share = for_device.longer_step(950_000_000, 11_900_000_000, 4096, device)
    assert least < share < most
    twice = pytest.approx(2 * share)
    assert for_device.longer_step(1_900_000_000, 11_900_000_000, 4096, device) == twice
    monkeypatch.setattr(for_device.args, "disable_pinned_memory", True)
    assert for_device.longer_step(950_000_000, 11_900_000_000, 4096, device) == twice
    assert for_device.longer_step(950_000_000, 11_900_000_000, 4096, torch.device("cpu")) is None
    seconds = for_device.step_seconds(11_900_000_000, 4096, device)
    minutes = round((96 + 4 * 504) * seconds / 60)
    assert f"about {minutes} min (estimate)" in measuring_advice(
        0.01, usual_steps(504) * seconds)
    assert measuring_advice(0.0001, seconds) == ""


def test_packed_files_are_left_as_they_are_where_they_fit_and_never_become_int8(monkeypatch):
    monkeypatch.setattr(for_device, "STEP", STEP)
    shapes = {f"double_blocks.{index}.img_mlp.0.weight": (1024, 256) for index in range(9)}
    packed = dict.fromkeys(shapes, 1024 * 144)
    nbytes = sum(packed.values())
    sizes = Sizes([Weights(shapes, nbytes, packed)])
    assert choose(sizes, lambda workspace: nbytes if workspace else 0, True) == Choice("", nbytes)
    packed = dict.fromkeys(shapes, 1024 * 400)
    nbytes = 9 * 1024 * 300
    for stored, target in ((packed, nbytes // STEP * STEP), ({}, for_device.FAST_TYPE)):
        weights = [Weights(shapes, nbytes + 1, stored)]
        assert choose(Sizes(weights), lambda _: nbytes, True).target == target


@pytest.mark.parametrize("stored", [100, 144, 180, 300])
def test_packed_weights_stay_or_become_smaller(stored):
    shapes = {f"double_blocks.{index}.img_mlp.0.weight": (1024, 256) for index in range(9)}
    packed = dict.fromkeys(shapes, 1024 * stored)
    whole = plan_for_size(shapes, 9 * 1024 * stored, rules_for(shapes), packed=packed)
    assert set(whole.types.values()) == {STAYS}
    if stored > 84:  # a block of Q2_K
        less = plan_for_size(shapes, 9 * 1024 * stored - 1, rules_for(shapes), packed=packed)
        types = list(less.types.values())
        assert types.count(STAYS) == 8 and relative_error(STAYS) == 0


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
        r"For a GPU of 12 GB, which leaves \d+\.\d MB for the weights: as good as Q\d_[K0]"
        r", loss: .* \(.* of the weights\)\. mix for a size, \S+ GB, at pack to gives the same on"
        r" every device\..*",
        fit_text(model))
    fixed = load_diffusion_model(flux_in_bfloat16(), pack_to=packed_type(MIX, size / 1e9))
    assert digest(fixed) == digest(model) and fit_text(fixed) == ""
    room(FLUX_BYTES)  # another device
    again, _ = model.cached_patcher_init
    assert digest(pickle.loads(pickle.dumps(again))()) == digest(
        load_diffusion_model(flux_in_bfloat16()))


def test_what_a_model_that_is_too_large_copies_is_said(room):
    room(FLUX_BYTES * 0.1, main_gib=8)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    size, copied = map(float, re.search(
        r"as good as Q4_K, loss: small \(7 % of the weights\)\. mix for a size, (\S+) GB, .*\."
        r" (\S+) MB copied in each step: Place Model", fit_text(model)).groups())
    assert size * 1000 - copied == pytest.approx(FLUX_BYTES / 1e7, abs=5)
    assert copying_text(model) == f"{copied:.2f} MB copied in each step"
    assert {format_name(weight) for weight in model.model.diffusion_model.double_blocks.parameters()
            if is_packed(weight)} == {"Q4_K"}


def test_place_model_shows_what_was_expected_next_to_what_was_copied(room):
    room(FLUX_BYTES * 0.1, main_gib=8)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT).clone()
    report = MemoryReport(10 ** 9, 6 * 10 ** 8, {}, 4 * 10 ** 8, 4 * 10 ** 8)
    lines = placed_text(model, report).splitlines()
    assert lines[1].startswith("400.0 MB copied per step")
    assert lines[2] == f"expected: {copying_text(model)}" and "copied in each step" in lines[2]
    model = load_diffusion_model(flux_in_bfloat16())
    assert "expected" not in placed_text(model, report)


def test_weights_below_the_floor_are_named_with_what_they_lack(room, monkeypatch):
    room(FLUX_BYTES * 0.1)
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=FIT)
    assert re.search(r"as good as Q2_K, loss: large \(26 % .*\).* copied in each step.* Q4_K,"
                     r" which loses less, takes \S+ .B more than there is for it in main memory",
                     fit_text(model))
    assert for_device.smaller_model(32_000_000_000, False) == "Flux.2 Klein 9B"
    assert for_device.smaller_model(14_000_000_000, True) == "Wan 2.2 5B"
    assert for_device.smaller_model(1_000_000_000, True) == ""


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


def test_a_packed_file_as_coarse_as_the_floor_stays_and_the_rest_is_copied(room):
    path, _ = flux_file("Q4_K")
    nbytes = load_diffusion_model(path).model_size()
    room(0.8 * nbytes, main_gib=8)
    model = load_diffusion_model(path, pack_to=FIT)
    assert digest(model) == digest(load_diffusion_model(path))
    assert re.search(r"they stay as in the file\. \S+ .B copied in each step", fit_text(model))


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
        fixed = (int(share * nbytes) + 100_000) // STEP * STEP
        again = load_text_encoder(paths, "sd3", pack_to=fixed, model_options=options)
        assert digest(again.patcher) == digest(clip.patcher)


def test_memory_that_is_shared_holds_both_experts_of_a_model():
    configs = {model.name: model.config() for model in REAL}
    wan, small = (configs[name] for name in ("Wan 2.1 14B T2V, Wan 2.2 14B (each of its two)",
                                             "Wan 2.1 1.3B"))
    assert [for_device.experts_of(config) for config in (wan, small, None)] == [2, 1, 1]
    mac, card = Memory(64, True), Memory(24)
    assert mac.for_model(GIB, experts=2) == mac.for_model(GIB) // 2 == 16 * GIB
    assert card.for_model(GIB, experts=2) == card.for_model(GIB)  # one at a time


def test_the_measurement_of_the_model_decides_where_bits_go(monkeypatch):
    target = int(FLUX_BYTES * 0.35)
    plain = load_diffusion_model(flux_in_bfloat16(), pack_to=target)
    shapes = {name: tuple(values.shape) for name, values in tiny_flux().items()
              if values.ndim == 2 and "_blocks." in name}
    measured = "double_blocks.0.img_mlp.0.weight"
    costs = {name: {"Q4_K": 1.0 if name == measured else 1e-6} for name in shapes}
    path = f"{folder().name}/bf16 to fit_00002_.sensitivity"
    Sensitivity(costs, shapes).save(path)
    monkeypatch.setattr(pack_on_load, "sensitivities_of", lambda model_path: [path])
    model = load_diffusion_model(flux_in_bfloat16(), pack_to=target)
    weight = model.model.diffusion_model.get_parameter(measured)
    assert weight.nbytes > plain.model.diffusion_model.get_parameter(measured).nbytes
    assert model.model_size() <= target + UNPLANNED
    # what the weights lose says nothing of the image then
    assert "loss: " in memory_summary(plain) and "loss: " not in memory_summary(model)


def test_who_has_a_mix_without_a_measurement_reads_what_one_gives(monkeypatch, room):
    room(FLUX_BYTES * 0.3)
    assert measuring_advice(0.01) in fit_text(load_diffusion_model(flux_in_bfloat16(), pack_to=FIT))
    path = f"{folder().name}/bf16 to fit_00003_.sensitivity"
    name = "double_blocks.0.img_mlp.0.weight"
    Sensitivity({name: {"Q4_K": 1.0}}, {name: tuple(tiny_flux()[name].shape)}).save(path)
    monkeypatch.setattr(pack_on_load, "sensitivities_of", lambda model_path: [path])
    text = fit_text(load_diffusion_model(flux_in_bfloat16(), pack_to=FIT))
    assert "as good as" in text and "Measure Sensitivity" not in text


def test_a_size_that_is_too_small_is_refused_in_a_sentence():
    with pytest.raises(WeightFileError, match=r"^bf16 to fit.safetensors: A size of 1.00 MB is too"
                       r" small for this model: .* Ask for that much or more"):
        load_diffusion_model(flux_in_bfloat16(), pack_to=1_000_000)
    for size in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="^size in GB is .*; expected how large the weights"):
            packed_type(MIX, size)
    assert packed_type(NO_CHANGE, 3.0) is None and packed_type(FIT, 3.0) == FIT
    assert packed_type(MIX, 8.93) == 8_930_000_000


def test_a_packed_module_next_to_a_model_takes_no_room_from_its_packing():
    model = {f"blocks.{block}.weight": (4096, 4096) for block in range(40)}
    module = {f"vace_blocks.{block}.weight": (4096, 4096) for block in range(4)}
    dense = Weights(model, plan_for_type(model, "BF16", rules_for(model)).nbytes(model), {})
    q4_k = plan_for_type(module, "Q4_K", rules_for(module))
    stored = {name: q4_k.nbytes(module) // len(module) for name in module}
    packed = Weights(module, sum(stored.values()), stored)
    alone, both = Sizes([dense]), Sizes([dense, packed])
    for type_name in ("Q6_K", "Q4_K"):
        assert alone.as_good_as[type_name] < both.as_good_as[type_name] <= (
            alone.as_good_as[type_name] + packed.nbytes + for_device.STEP)
    assert both.least <= alone.least + packed.nbytes + for_device.STEP
    for size in (both.least, both.as_good_as["Q4_K"], both.nbytes):
        parts = for_device.shares(size, both.files)
        assert sum(parts) <= size and parts[1] <= packed.nbytes
        for part, file in zip(parts, both.files, strict=True):  # there is a plan for each
            plan_for_size(file.shapes, part, rules_for(file.shapes), packed=file.packed)


def test_what_is_lacked_is_of_the_larger_of_card_and_main_memory():
    shapes = {f"blocks.{block}.weight": (4096, 4096) for block in range(20)}
    sizes = Sizes([Weights(shapes, 2 * 20 * 4096 ** 2, {})])
    floor, last, least = sizes.as_good_as["Q4_K"], sizes.as_good_as["Q3_K"], sizes.least
    room = floor - 2 * for_device.STEP
    assert choose(sizes, lambda _: room, main=for_device.STEP).lack == 2 * for_device.STEP
    main = (last + least) // 2 // for_device.STEP * for_device.STEP
    assert choose(sizes, lambda _: 0, main=main).target == main > least
