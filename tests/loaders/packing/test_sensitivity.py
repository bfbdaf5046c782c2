"""Measuring leaves a model as it was, sees what its layers see, and tells costs as an exchanged
weight would; its file is for models with these layers only."""
import dataclasses
import functools
import json
import re
from pathlib import Path

import comfy.model_management
import pytest
import safetensors.torch
import torch
from families import FAMILIES, host_patcher, random_weights, shrunken_detection
from pack_api import FORMATS, ROW_TYPES, SecondMoments, WeightFileError, pack_tensor
from patched_models import hooks_in, packed_flux
from safetensors import safe_open
from safetensors.torch import save_file

from featherweight import nodes
from featherweight.loaders.families import rules_for
from featherweight.loaders.packing.calibration import measure as measuring
from featherweight.loaders.packing.calibration import sampling, sensitivity
from featherweight.loaders.packing.calibration.measure import (
    CHOICES,
    NORMAL,
    THOROUGHNESS,
    Costs,
    measure,
    usual_steps,
)
from featherweight.loaders.packing.calibration.moment_collector import (
    Collector,
    dense_weight,
    linear_layers,
    shapes_of,
)
from featherweight.loaders.packing.calibration.sampling import (
    SamplingRun,
    load,
    random_conditioning,
)
from featherweight.loaders.packing.calibration.sensitivity import (
    SHOWN,
    Sensitivity,
    SensitivityError,
    report,
    summary,
)
from featherweight.loaders.packing.planning.plan import plan_for_size, types_for
from featherweight.ops.packing.method_choice import output_errors
from featherweight.ops.packing.pack_types import GGUF_TYPES, TYPES, PackType

pytestmark = pytest.mark.usefixtures("small_models")

MEASURED = ("flux-dev", "sd1.5", "wan2.1-t2v")
NO_PROMPT = (
    "flux2",
    "chroma",
    "sd3.5",
    "hunyuan-video",
    "ltxv",
    "lumina2",
    "qwen-image",
    "aura-flow",
)
PROMPT = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(0)), {}]]  # Wan's


def patcher_of(name: str, monkeypatch):
    shrunken_detection(FAMILIES[name], monkeypatch)
    return host_patcher(random_weights(FAMILIES[name]), FAMILIES[name])


def small_drawing(name: str, **options) -> SamplingRun:
    latent = {"samples": torch.zeros(1, *FAMILIES[name].latent[1:])}
    return SamplingRun((), latent, **{"samples": 1, "steps": 3, "seed": 1} | options)


@pytest.mark.parametrize("name", MEASURED)
def test_a_model_is_measured_without_a_prompt_and_left_as_it_was(name, monkeypatch):
    patcher = patcher_of(name, monkeypatch)
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    found = measure(patcher, small_drawing(name), "fast" if name == "sd1.5" else NORMAL)
    layers = linear_layers(patcher.model)
    assert found.costs.keys() == found.shapes.keys() == layers.keys() and len(layers) > 8
    for key, of_types in found.costs.items():
        of_gguf, shape = types_for(found.shapes[key]), found.shapes[key]
        of_comfyui = [name for name, row_type in ROW_TYPES.items() if row_type.takes(shape)]
        assert list(of_types) == [*of_gguf, "NF4", *of_comfyui]
        values = [of_types[type_name] for type_name in of_gguf]
        assert all(0 < value < 1 for value in values) and values[-1] < 0.05 * values[0], key
        assert found.moments(key).columns == found.shapes[key][1]
    shapes = shapes_of(patcher.model)
    plan_for_size(shapes,
                  sum(3 * value.numel() for value in before.values()) // 2, rules_for(shapes),
                  found.costs)
    assert hooks_in(patcher) == 0 and "model_function_wrapper" not in patcher.model_options
    after = patcher.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", NO_PROMPT)
def test_random_numbers_take_the_place_of_a_prompt(name, monkeypatch):
    patcher, drawing = patcher_of(name, monkeypatch), small_drawing(name, steps=1)
    layers = linear_layers(patcher.model)
    with Collector(layers) as collector:
        dataclasses.replace(drawing, prompts=random_conditioning(patcher, drawing, 1)).run(
            patcher, lambda *_: None
        )
    assert layers and all(collector.moments_of(layer).count for layer in layers)
    assert hooks_in(patcher) == 0


def test_a_model_with_several_texts_is_refused_without_a_prompt(monkeypatch):
    patcher = patcher_of("hidream", monkeypatch)
    with pytest.raises(WeightFileError,
                       match="HiDream cannot be measured without a prompt.*Connect positive"):
        measure(patcher, small_drawing("hidream"))
    assert hooks_in(patcher) == 0


def test_moments_are_those_of_what_enters_a_layer(monkeypatch):
    patcher = patcher_of("wan2.1-t2v", monkeypatch)
    layers, seen = linear_layers(patcher.model), {}
    name = "blocks.0.ffn.0.weight"

    def keep(step, layer, inputs):
        seen.setdefault(step[0], []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

    step, held_out = [0], set()
    handle = layers[name].register_forward_pre_hook(functools.partial(keep, step))

    def next_step(number, _):
        step[0] = number
        collector.next_step(number)
        held_out.update([number] if collector.hold_out else [])

    with handle, Collector(layers) as collector:
        dataclasses.replace(small_drawing("wan2.1-t2v", steps=8),
                            prompts=[PROMPT]).run(patcher, next_step)
    fitted = torch.cat(
        [part for number, parts in seen.items() if number not in held_out for part in parts])
    moments = collector.moments_of(name)
    assert 0 < len(held_out) < 4 and 0 not in held_out
    assert moments.count == len(fitted) and moments.held_out_count == 4 * 2 * len(
        held_out
    ) == 8 * len(held_out)
    torch.testing.assert_close(moments.blocks[0].double(), fitted.T @ fitted, rtol=1e-4, atol=1e-2)


def test_layers_with_the_same_input_share_their_moments(monkeypatch):
    patcher = patcher_of("wan2.1-t2v", monkeypatch)
    found = measure(patcher, small_drawing("wan2.1-t2v", steps=2), "fast")
    q, k, v, o = (found.moments(f"blocks.0.self_attn.{part}.weight") for part in "qkvo")
    assert q is k is v and o is not q
    assert (
        found.moments("blocks.0.cross_attn.k.weight")
        is found.moments("blocks.0.cross_attn.v.weight")
        is not q
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_cost_is_what_the_exchanged_weight_does_to_the_output(packed, monkeypatch):
    patcher = packed_flux("Q8_0") if packed else patcher_of("flux-dev", monkeypatch)
    steps, layers = [], linear_layers(patcher.model)
    width, latent = 256, {"samples": torch.zeros(1, 16, 8, 8)}
    prompt = [[
        torch.randn(1, 7, width, generator=torch.Generator().manual_seed(0)),
        {"pooled_output": torch.randn(1, 768)}
    ]]
    SamplingRun([prompt], latent, samples=1, steps=2).run(
        patcher, lambda number, step: steps.append(step)
    )
    load(patcher)
    with torch.no_grad():
        measured, name = Costs(patcher.model, steps), "double_blocks.0.img_mlp.2.weight"
        weight = dense_weight(layers[name], torch.device("cpu"))
        q3 = pack_tensor(weight, FORMATS["Q3_K"])
        cost = measured.output_error(layers[name], weight, q3)
        layers[name].weight = torch.nn.Parameter(q3 if packed else q3.dequantize(),
                                                 requires_grad=False)
        outputs = [step.run(patcher.model) for step in steps]
    expected = sum(((output - dense).square().sum() / dense.square().sum()).item()
                   for output, dense in zip(outputs, measured.dense)) / len(steps)
    assert cost == pytest.approx(expected, rel=0.02) and cost > 1e-6


def test_the_measurement_of_every_type_runs_the_model_for_each(monkeypatch):
    patcher, runs = patcher_of("wan2.1-t2v", monkeypatch), []
    monkeypatch.setattr(Costs, "output_error",
                        lambda self, layer, weight, packed: runs.append(packed) or 1e-3)
    pack = PackType.pack
    monkeypatch.setattr(PackType, "pack", lambda self, weight, moments=None, importance=None: (
        None if moments else pack(self, weight, importance=importance)))
    monkeypatch.setattr(measuring, "output_errors", lambda *_: [1.0])
    for thoroughness, of_each in (("fast", 0), ("normal", 1),
                                  ("one run per layer and type", len(GGUF_TYPES))):
        runs.clear()
        found = measure(patcher, small_drawing("wan2.1-t2v", steps=1), thoroughness)
        assert len(runs) == of_each * len(found.costs)
    assert set(CHOICES) < THOROUGHNESS.keys() and CHOICES[0] == NORMAL


@pytest.mark.parametrize("thoroughness", CHOICES)
def test_the_time_is_said_before_by_one_timed_call_and_all_that_follow(thoroughness, monkeypatch):
    patcher, headings, calls = patcher_of("sd1.5", monkeypatch), [], []
    run = sampling.SamplingStep.run
    monkeypatch.setattr(sampling.SamplingStep, "run",
                        lambda self, model: calls.append(len(headings)) or run(self, model))
    monkeypatch.setattr(measuring.Progress, "set_heading",
                        lambda self, text: headings.append(text))
    measure(patcher, small_drawing("sd1.5", steps=4), thoroughness)
    heading, = headings
    count, seconds = re.fullmatch(
        r"takes about \d\d:\d\d: (\d+) calls of the model, ([\d.e-]+) s each", heading).groups()
    assert int(count) == 4 + len(calls) and 0 < float(seconds) < 60
    assert set(calls) <= {1}  # it was there before
    page = Path(nodes.__file__).parent / "web" / "docs" / "FeatherweightMeasureSensitivity.md"
    flux = usual_steps(504)
    assert f"{flux:,} times, estimated {flux / 60:.0f} minutes" in page.read_text(encoding="utf-8")


def correlated_inputs(columns: int, vectors: int) -> SecondMoments:
    """Moments of inputs near what a few vectors span, as those of text and modulation are."""
    generator = torch.Generator().manual_seed(0)
    span = torch.randn(vectors, columns, generator=generator) + 1
    moments = SecondMoments.zeros(columns)
    for hold_out in (False, True):
        inputs = torch.randn(2048, vectors, generator=generator) @ span
        moments.add(inputs + torch.randn(2048, columns, generator=generator) / 4, hold_out=hold_out)
    return moments


@pytest.mark.parametrize("vectors", [1, 4])
def test_a_type_costs_what_its_error_is_with_error_feedback(vectors):
    """Float8 may cost less: with 64 vectors a fifth of what is told."""
    rows = 1056  # of which every fifth are not whole blocks of mxfp8
    weight = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)) / 16
    moments = correlated_inputs(512, vectors)
    costs = measuring.estimate_costs(weight, moments, measuring.errors_of_layer(weight, moments)[0])
    assert costs.keys() == {*types_for((rows, 512)), "NF4", *ROW_TYPES}
    for type_name, cost in costs.items():
        packed = TYPES[type_name].pack(weight, moments)
        error = output_errors(weight, [packed], moments)[0]
        assert cost == pytest.approx(error, rel=0.25), type_name


@pytest.mark.parametrize("at", ["a step", "a layer"])
def test_a_cancel_leaves_no_hook(at, monkeypatch):
    patcher, measure_layer = patcher_of("wan2.1-t2v", monkeypatch), Costs.measure_layer

    def interrupted(self, *args):
        comfy.model_management.interrupt_current_processing()
        return measure_layer(self, *args)

    monkeypatch.setattr(Costs, "measure_layer", interrupted)
    monkeypatch.setattr(measuring, "random_conditioning", lambda *_: [PROMPT])
    if at == "a step":
        comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        measure(patcher, small_drawing("wan2.1-t2v"))
    assert hooks_in(patcher) == 0


def test_a_file_holds_the_measurement_and_is_for_its_model_only(monkeypatch, tmp_path):
    patcher, path = patcher_of("wan2.1-t2v", monkeypatch), tmp_path / "wan.sensitivity"
    found = measure(patcher, small_drawing("wan2.1-t2v"), "fast")
    found.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["wan.sensitivity"]
    loaded, shapes = Sensitivity.load(path), shapes_of(patcher.model)
    assert (loaded.costs, loaded.shapes, loaded.about, loaded.digest) == (
        found.costs,
        found.shapes,
        found.about,
        found.digest,
    )
    for name in found.shapes:
        torch.testing.assert_close(loaded.moments(name).importance, found.moments(name).importance)
    assert loaded.moments("patch_embedding.weight") is None
    loaded.save(again := tmp_path / "again.sensitivity")
    for name in found.shapes:
        torch.testing.assert_close(Sensitivity.load(again).moments(name).importance,
                                   found.moments(name).importance)
    loaded.match(shapes)
    with pytest.raises(
            SensitivityError,
            match=r"wan.sensitivity was measured on another.*ffn.0.weight of \(512, 256\) is"):
        loaded.match(shapes | {"blocks.0.ffn.0.weight": (512, 512)})
    with pytest.raises(SensitivityError, match=r"is missing here, and 10 of 10 layers do not fit"):
        loaded.match({"a.0.weight": (512, 512)})
    for lines in (report(loaded).splitlines(), summary(loaded).splitlines()):
        assert any(re.match(r"blocks.*ffn.0: .*[0-9]", line) for line in lines)
        assert "error of the output in %" in "".join(lines)
        assert not any("  " in line for line in lines)  # columns, which no node keeps
    assert all(len(line) < 50 for line in summary(loaded).splitlines())


def test_the_worst_layers_are_the_first(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    costs = {f"blocks.{number}.ffn.weight": dict(zip(
        SHOWN[number % 2:], torch.rand(len(SHOWN), generator=generator).tolist()))
        for number in range(9)}
    lines = report(Sensitivity(costs, {})).splitlines()[1:]
    first = [float(re.search(r": \w+ ([-\d.]+)", line)[1]) for line in lines]
    assert len(first) == 9 and first == sorted(first, reverse=True)
    lines = summary(Sensitivity(costs, {})).splitlines()
    on_node = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("blocks")]
    assert on_node == sorted(on_node, reverse=True) != []


@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 9, None])
def test_another_file_is_refused_in_one_sentence(content, tmp_path):
    path = tmp_path / "a.sensitivity"
    if content is None:
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(SensitivityError, match="a.sensitivity is not a measurement"):
        Sensitivity.load(path)


@pytest.fixture
def small_file(tmp_path):
    moments = SecondMoments.zeros(256)
    moments.add(torch.randn(64, 256))
    path = tmp_path / "a.sensitivity"
    Sensitivity({"a.weight": {"Q3_K": 0.1}}, {"a.weight": (8, 256)},
                _moments=lambda name: moments).save(path)
    return path


@pytest.mark.parametrize("left", [300, -1])
def test_a_file_that_is_not_whole_is_refused_in_one_sentence(left, small_file):
    whole = small_file.read_bytes()
    loaded = Sensitivity.load(small_file)
    small_file.write_bytes(whole[:left])
    for read in (lambda: Sensitivity.load(small_file), lambda: loaded.moments("a.weight")):
        with pytest.raises(
                SensitivityError,
                match="^a.sensitivity is damaged or was not copied completely. Copy it again"):
            read()
    small_file.unlink()
    with pytest.raises(SensitivityError, match="^a.sensitivity cannot be read: No such file"):
        loaded.moments("a.weight")


def test_a_file_of_another_format_is_refused_in_one_sentence(small_file, monkeypatch):
    monkeypatch.setattr(sensitivity, "FORMAT", 7)
    with pytest.raises(
            SensitivityError,
            match="^a.sensitivity is of format 2, this version reads 7. Update this pack, or"):
        Sensitivity.load(small_file)


def test_a_file_without_the_parts_of_a_layer_is_refused_in_one_sentence(small_file):
    whole = safetensors.torch.load(small_file.read_bytes())
    with safe_open(small_file, "pt") as opened:
        about = opened.metadata()
    save_file({name: value for name, value in whole.items() if "steps" not in name}, small_file,
              about)
    with pytest.raises(SensitivityError, match="^a.sensitivity is damaged"):
        Sensitivity.load(small_file).moments("a.weight")


@pytest.mark.parametrize("part", [
    {"costs": {"a.weight": 7}}, {"costs": {"a.weight": {"Q3_K": "much"}}},
    {"costs": {"a.weight": {"Q3_K": 10**400}}}, {"costs": []}, {"shapes": {"a.weight": ["x", 2]}},
    {"shapes": {"a.weight": None}}, {"same_as": 7}, {"about": 7}, {"about": [[]] * 9000}])
def test_a_file_whose_description_is_of_other_types_is_refused_in_one_sentence(part, small_file):
    whole = safetensors.torch.load(small_file.read_bytes())
    with safe_open(small_file, "pt") as opened:
        about = json.loads(opened.metadata()[sensitivity.KEY])
    save_file(whole, small_file, {sensitivity.KEY: json.dumps(about | part)})
    with pytest.raises(SensitivityError, match="^a.sensitivity is damaged"):
        Sensitivity.load(small_file)


def test_a_prompt_of_noise_ends_as_prompts_do_in_tokens_that_are_alike():
    ((texts, _),) = sampling._noise({"text": 16, "pooled": 8}, 3, False, pictures=8)
    own = [len(text.unique(dim=0)) for text in texts]
    assert all(count in sampling.WORDS for count in own) and len(set(own)) > 1
    assert all((text[count - 1:] == text[-1]).all() for text, count in zip(texts, own))


def test_a_lack_of_memory_while_a_prompt_is_looked_for_is_told(monkeypatch):
    patcher = patcher_of("flux-dev", monkeypatch)

    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SamplingRun, "run", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        random_conditioning(patcher, small_drawing("flux-dev"), 1)


def test_a_measurement_that_is_written_to_while_it_is_in_use_is_an_error(tmp_path, monkeypatch):
    patcher, path = patcher_of("flux-dev", monkeypatch), tmp_path / "flux.sensitivity"
    measure(patcher, small_drawing("flux-dev"), "fast").save(path)
    found = Sensitivity.load(path)
    name = next(iter(found.costs))
    found.moments(name)
    with open(path, "ab") as file:
        file.truncate(path.stat().st_size - 1)
        file.write(b"\0")
    with pytest.raises(SensitivityError,
                       match=r"^flux\.sensitivity was written to or replaced while it was in use"):
        found.moments(name)
