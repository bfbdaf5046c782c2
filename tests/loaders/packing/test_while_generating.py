"""A model is measured by images that are generated anyway: they stay equal, and what goes wrong
with the measurement costs none of them."""
import dataclasses
import itertools
import random

import folder_paths
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from families import FAMILIES, host_patcher, random_weights, shrunken_detection
from pack_api import SecondMoments, source_of_model
from patched_models import dense_flux
from saving import save

from featherweight.loaders.files.atomic_file import WriteError
from featherweight.loaders.packing.calibration import while_generating
from featherweight.loaders.packing.calibration.measure import measurement_of
from featherweight.loaders.packing.calibration.moment_collector import Collector, linear_layers
from featherweight.loaders.packing.calibration.sampling import (
    SamplingRun,
    random_conditioning,
)
from featherweight.loaders.packing.calibration.sensitivity import Sensitivity, report, summary
from featherweight.loaders.packing.calibration.while_generating import (
    MEASURED_CALLS,
    WhileGenerating,
)
from featherweight.loaders.progress import Progress
from featherweight.nodes.measure_sensitivity import WHILE_GENERATING, MeasureSensitivity

pytestmark = pytest.mark.usefixtures("small_models", "one_thread")
NAME = "wan2.1-t2v"


class Generation:
    """Images of a small model and the outputs that each call of it gave."""

    def __init__(self, monkeypatch):
        shrunken_detection(FAMILIES[NAME], monkeypatch)
        self.patcher = host_patcher(random_weights(FAMILIES[NAME]), FAMILIES[NAME])
        latent = {"samples": torch.zeros(1, *FAMILIES[NAME].latent[1:])}
        drawing = SamplingRun((), latent, samples=1, steps=8, seed=1)
        self.drawing = dataclasses.replace(
            drawing, prompts=random_conditioning(self.patcher, drawing, 1))

    def generate(self, patcher) -> list[torch.Tensor]:
        seen = []
        self.drawing.run(patcher, lambda number, step: seen.append(step.x.clone()))
        return seen


@pytest.fixture
def generation(monkeypatch) -> Generation:
    return Generation(monkeypatch)


def test_the_images_are_those_without_a_measurement_and_nothing_is_left_on_the_model(generation):
    expected = generation.generate(generation.patcher)
    saved = []
    model = WhileGenerating(saved.append).attach(generation.patcher)
    found = generation.generate(model)
    assert len(found) == 8 and all(map(torch.equal, found, expected))
    assert len(saved) == 1 and not any(layer._forward_pre_hooks or layer._forward_hooks
                                       for layer in generation.patcher.model.modules())


def test_it_is_saved_after_each_power_of_two_with_all_images_until_then(generation):
    saved = []
    model = WhileGenerating(lambda found: saved.append(
        (found.about["samples"], found.moments(next(iter(found.shapes))).count))
    ).attach(generation.patcher)
    for _ in range(9):
        generation.generate(model)
    images, tokens = zip(*saved, strict=True)
    assert images == (1, 2, 4, 8) and tokens == tuple(sorted(set(tokens)))


@pytest.mark.parametrize("most_tokens", [1, 3, 1024])
def test_the_moments_are_those_of_some_tokens_of_about_every_fourth_call(generation, most_tokens,
                                                                         monkeypatch):
    monkeypatch.setattr(while_generating, "MOST_TOKENS", most_tokens)
    name, inputs = "blocks.0.ffn.0.weight", []
    layer = linear_layers(generation.patcher.model)[name]
    saved = []
    model = WhileGenerating(saved.append).attach(generation.patcher)
    with layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].double())):
        for _ in range(4):
            generation.generate(model)
    moments = saved[-1].moments(name)
    assert len(inputs) == 32
    tokens = inputs[0].numel() // inputs[0].shape[-1]
    of_a_call = len(range(0, tokens, -(-tokens // most_tokens)))
    calls, rest = divmod(moments.count + moments.held_out_count, of_a_call)
    # three times the first call of a last quarter, too
    assert of_a_call <= most_tokens and not rest and -1 <= calls - 32 * MEASURED_CALLS <= 4
    assert 0 < moments.held_out_count < moments.count
    squares = torch.stack([given.reshape(tokens, -1)[::-(-tokens // most_tokens)].square().sum(0)
                           for given in inputs])
    assert bool((moments.diagonal <= squares.sum(0) * (1 + 1e-5)).all())


@pytest.mark.fake_gpus
def test_on_a_gpu_it_holds_no_memory_after_a_call(generation):
    measured = WhileGenerating(lambda found: None)
    measured._next_save = 9  # costs are computed with the kernels' tables on the GPU, which stay
    model, taken = measured.attach(generation.patcher), []
    for _ in range(3):
        generation.generate(model)
        taken.append(torch.cuda.memory_allocated())
    assert taken[1:] == taken[:1] * 2
    moments = measured._collector.moments.values()
    assert moments and {value.blocks.device.type for value in moments} == {"cpu"}


@pytest.mark.parametrize("error", [WriteError("The disk is full."), ValueError("NaN")])
def test_an_error_while_it_is_saved_costs_no_image_and_ends_the_measurement(generation, error,
                                                                            caplog):
    def save(measurement):
        raise error

    measured = WhileGenerating(save)
    model = measured.attach(generation.patcher)
    for _ in range(2):
        assert len(generation.generate(model)) == 8
    assert caplog.text.count(f"Measure Sensitivity: the measurement was not saved: {error}") == 1
    assert measured.images == 1


def test_an_error_in_a_call_costs_no_image_and_ends_the_measurement(generation, monkeypatch,
                                                                    caplog):
    expected, saved = generation.generate(generation.patcher), []
    number, add = random.randrange(30), SecondMoments.add

    def fail_once(self, *args, **options):
        nonlocal number
        number -= 1
        if number == -1:
            raise torch.OutOfMemoryError("Allocation on device")
        return add(self, *args, **options)

    monkeypatch.setattr(SecondMoments, "add", fail_once)
    model = WhileGenerating(saved.append).attach(generation.patcher)
    for _ in range(2):
        assert all(map(torch.equal, generation.generate(model), expected))
    text = "Measure Sensitivity: the measurement ends here: Allocation on device"
    assert number == -1 and not saved and caplog.text.count(text) == 1


def test_too_little_main_memory_is_said_once_and_nothing_is_measured(generation, monkeypatch,
                                                                     caplog):
    monkeypatch.setattr(while_generating, "MAIN_SHARE", 1e-9)
    saved = []
    model = WhileGenerating(saved.append).attach(generation.patcher)
    for _ in range(2):
        assert len(generation.generate(model)) == 8
    assert not saved and caplog.text.count("nothing is measured: it takes up to") == 1


def test_a_compiled_model_is_not_measured_and_it_is_said(generation, caplog):
    saved = []
    model = WhileGenerating(saved.append).attach(generation.patcher)
    set_torch_compile_wrapper(model, backend="eager")
    assert len(generation.generate(model)) == 8
    assert not saved and "nothing is measured: torch.compile" in caplog.text


def test_two_in_a_row_measure_both_and_never_share_a_file(generation, tmp_path, monkeypatch):
    """They have one name, and both were asked before either wrote."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model = generation.patcher
    for _ in range(2):
        _, text, model = MeasureSensitivity.execute(
            [model], [1], [1], [1.0], [0], [WHILE_GENERATING], ["own"]).result
        assert text.startswith("own_00001_.sensitivity\nor the next free number will be written")
    files = [tmp_path / "sensitivity" / f"own_0000{number}_.sensitivity" for number in (1, 2)]
    for images in (1, 2):
        generation.generate(model)
        assert sorted((tmp_path / "sensitivity").iterdir()) == files
        assert [Sensitivity.load(file).about["samples"] for file in files] == [images] * 2


def inputs_of(generation, model, layer, steps: int, images: int) -> list[torch.Tensor]:
    """The sum of squares of a layer's inputs in each call."""
    squares = []
    generation.drawing = dataclasses.replace(generation.drawing, steps=steps)
    with layer.register_forward_pre_hook(lambda _, given: squares.append(
            given[0].double().reshape(-1, layer.in_features).square().sum(0))):
        for _ in range(images):
            generation.generate(model)
    return squares


@pytest.mark.parametrize(("steps", "images"), [(2, 1), (3, 1), (4, 1), (9, 1), (4, 4), (1, 8)])
def test_the_last_quarter_of_the_calls_since_the_last_save_is_held_out_but_none_of_one_image(
        generation, steps, images, monkeypatch):
    monkeypatch.setattr(while_generating, "MEASURED_CALLS", 1)
    monkeypatch.setattr(while_generating, "MOST_TOKENS", 1 << 20)
    # the costs take long, and do not matter here
    monkeypatch.setattr(while_generating, "measurement_of", lambda _, collector, *__: collector)
    name, saved = "blocks.0.ffn.0.weight", []
    model = WhileGenerating(saved.append).attach(generation.patcher)
    squares = inputs_of(generation, model, linear_layers(model.model)[name], steps, images)
    times = [0, *(count for count in (1, 2, 4, 8) if count <= images)]
    fitted = []
    for start, stop in itertools.pairwise(count * steps for count in times):
        fitted += squares[start:start + int((0.75 if start else 1) * (stop - start))]
    moments = saved[-1].moments_of(name)
    torch.testing.assert_close(moments.diagonal.double(), sum(fitted), rtol=1e-4, atol=1e-4)
    assert moments.held_out_count * len(fitted) == moments.count * (len(squares) - len(fitted))


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 20])
def test_a_call_of_the_last_quarter_is_recorded_in_a_short_image(generation, steps, monkeypatch):
    monkeypatch.setattr(while_generating, "measurement_of", lambda _, collector, *__: collector)
    saved = []
    generation.drawing = dataclasses.replace(generation.drawing, steps=steps)
    model = WhileGenerating(saved.append).attach(generation.patcher)
    for _ in range(2):
        generation.generate(model)
    for moments in saved[1].moments.values():
        assert moments.count and moments.held_out_count


def measured_with(patcher, is_alike: bool) -> Sensitivity:
    """A measurement whose tokens held out are like those that it is fitted to, or not."""
    collector, generator = Collector(linear_layers(patcher.model)), torch.Generator().manual_seed(1)
    for name, layer in collector.layers.items():
        tokens = torch.randn(600, layer.in_features // 2, generator=generator)
        large_first = torch.cat([tokens, 0.1 * tokens], 1)
        collector.moments[name] = SecondMoments.zeros(layer.in_features)
        collector.moments[name].add(large_first, hold_out=False)
        collector.moments[name].add(
            large_first if is_alike else torch.cat([0.1 * tokens, -tokens], 1), hold_out=True)
    return measurement_of(patcher, collector, Progress("measuring"), {"samples": 1})


@pytest.mark.parametrize("target", ["Q4_K", 2_000_000])
def test_one_no_better_than_none_on_what_is_held_out_is_saved_and_not_used(tmp_path, target):
    model = dense_flux("F16")
    files = []
    for is_alike in (True, False, None):
        path = tmp_path / f"{is_alike}.sensitivity"
        if is_alike is not None:
            measured = measured_with(model, is_alike)
            assert measured.is_unused == (not is_alike)
            for text in (report(measured), summary(measured)):
                assert ("It is saved and will not be used." in text) == (not is_alike)
            measured.save(path)
        out = tmp_path / str(is_alike) / "a.gguf"
        out.parent.mkdir()
        saved = save(source_of_model(model), out, target,
                     sensitivity=None if is_alike is None else Sensitivity.load(path))
        files.append(out.read_bytes())
        assert (f"{path.name} is not used. On calls" in saved.text) == (is_alike is False)
        assert ("Loss: " in saved.text) == (is_alike is not True)
    assert files[0] != files[1] == files[2]


def test_its_file_is_read_as_any_other(generation, tmp_path):
    path = tmp_path / "own.sensitivity"
    model = WhileGenerating(lambda found: found.save(path)).attach(generation.patcher)
    for _ in range(2):
        generation.generate(model)
    found, layers = Sensitivity.load(path), linear_layers(generation.patcher.model)
    assert found.costs.keys() == found.shapes.keys() == layers.keys()
    assert found.match({name: tuple(layer.weight.shape) for name, layer in layers.items()}) is found
