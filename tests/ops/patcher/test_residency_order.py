"""Which layers stay: on models of real sizes that hold no weights, whose steps are counted as a run
would show them."""
import itertools
import random

import pytest
import torch

from featherweight.ops.patcher.residency_order import (
    FASTEST,
    LayerProfile,
    ProfileRecorder,
    golden_ratio_order,
    layer_entry,
    layers_that_fit,
    overlappable,
    residency_order,
)

# of the link, 1: all copies of a step take as long as its computing
SPEEDS = (0.25, 0.5, 0.75, 1, 1.33, 2, 4)
BUDGETS = (0.9, 0.75, 0.5, 0.25, 0.1)


class Layer(torch.nn.Module):
    comfy_cast_weights = True


class Model:
    """Layers in the order in which they run, and a step of them."""

    def __init__(self):
        self.entries, self.work, self.one_row, self.step = [], [], set(), LayerProfile()

    def linear(self, inputs: int, outputs: int, rows: int, times: int = 1):
        self.add(inputs * outputs, rows * inputs * outputs, times)
        if rows == 1:
            self.one_row.add(len(self.work) - 1)

    def convolution(self, inputs: int, outputs: int, width: int, kernel: int = 3):
        self.add(inputs * outputs * kernel**2, width**2 * inputs * outputs * kernel**2)

    def add(self, size: int, work: int, times: int = 1):
        name = str(len(self.entries))
        self.entries.append((0, size, name, Layer(), {}))
        self.work.append(work)
        for _ in range(times):
            self.step.add(name, work)

    @property
    def sizes(self) -> list[int]:
        return [entry[1] for entry in self.entries]

    def left_out(self, room: float, step: LayerProfile | None) -> set[int]:
        kept = layers_that_fit(residency_order(self.entries, room, step), room)
        return {index for index in range(len(self.entries)) if str(index) not in kept}

    def time(self, left_out: set[int], speed: float) -> float:
        """Of a step, in its work. Each copy begins where computing reaches the copied layer before
        it."""
        total = since = 0
        for index, (size, work) in enumerate(zip(self.sizes, self.work)):
            if index in left_out:
                total, since = total + max(since, size / speed), 0
            since += work
        return total + since


def flux(image: int = 4096, text: int = 512, overlappable: int = 3072) -> Model:
    """Flux of 12 billion weights, at a picture of 1024 x 1024."""
    model = Model()
    for inputs, rows in ((64, image), (256, 1), (overlappable, 1), (768, 1), (4096, text)):
        model.linear(inputs, overlappable, rows)
    for _ in range(19):
        for rows in (1, 1):
            model.linear(overlappable, 6 * overlappable, rows)
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1)):
            for rows in (image, text):
                model.linear(inputs * overlappable, outputs * overlappable, rows)
    for _ in range(38):
        model.linear(overlappable, 3 * overlappable, 1)
        model.linear(overlappable, 7 * overlappable, image + text)
        model.linear(5 * overlappable, overlappable, image + text)
    model.linear(overlappable, 64, image)
    return model


def unet(width: int = 128) -> Model:
    """A UNet such as that of SDXL: many sizes, and most bytes where the picture is smallest."""
    model = Model()

    def residual(inputs, outputs, width):
        model.convolution(inputs, outputs, width)
        model.linear(1280, outputs, 1)
        model.convolution(outputs, outputs, width)
        if inputs != outputs:
            model.convolution(inputs, outputs, width, kernel=1)

    def transformer(channels, width, depth):
        for _ in range(depth):
            for outputs in (1, 1, 1, 1, 1, 1, 8):
                model.linear(channels, outputs * channels, width**2)
            for _ in range(2):
                model.linear(2048, channels, 77)
            model.linear(4 * channels, channels, width**2)

    model.convolution(4, 320, width)
    for channels, before, depth, scale in ((320, 320, 0, 1), (640, 320, 2, 2), (1280, 640, 10, 4)):
        for inputs in (before, channels):
            residual(inputs, channels, width // scale)
            transformer(channels, width // scale, depth)
    transformer(1280, width // 4, 10)
    for channels, before, depth, scale in (
        (1280, (2560, 2560, 1920), 10, 4),
        (640, (1920, 1280, 960), 2, 2),
        (320, (960, 640, 640), 0, 1),
    ):
        for inputs in before:
            residual(inputs, channels, width // scale)
            transformer(channels, width // scale, depth)
    model.convolution(320, 4, width)
    return model


MODELS = {"flux": flux, "unet": unet}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", MODELS)
def test_no_more_is_copied_than_the_budget_asks_for_and_less_is_waited_for(name, budget):
    model = MODELS[name]()
    sizes, total = model.sizes, sum(model.sizes)
    left_out = model.left_out(budget * total, model.step)
    copied = sum(sizes[index] for index in left_out)
    assert 0 <= copied - (1 - budget) * total < min(sizes[index] for index in left_out)
    others = {"spread": model.left_out(budget * total, None)}
    every = range(len(sizes))
    for title, order in (("first", every), ("largest", sorted(every, key=sizes.__getitem__)[::-1])):
        kept = layers_that_fit([model.entries[index] for index in order], budget * total)
        others[title] = {index for index in every if str(index) not in kept}
    balanced = (1 - budget) * total / sum(model.work)
    for speed in SPEEDS:
        waited = {title: model.time(indices, speed * balanced) for title, indices in others.items()}
        least = max(sum(model.work), copied / (speed * balanced))
        time = model.time(left_out, speed * balanced)
        assert 0.9999 * least < time < 1.02 * min(waited.values())
        if speed == 1:
            assert time - least < 0.95 * (waited["spread"] - least)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5])
def test_nothing_is_waited_for_where_the_link_is_twice_as_fast_as_it_must_be(name, budget):
    model = MODELS[name]()
    total = sum(model.sizes)
    left_out = model.left_out(budget * total, model.step)
    speed = 2 * (1 - budget) * total / sum(model.work)
    assert model.time(left_out, speed) <= 1.001 * sum(model.work)
    assert model.time(model.left_out(budget * total, None), speed) > 1.01 * sum(model.work)


def test_layers_that_run_more_often_stay_and_those_that_do_not_run_do_not():
    model = Model()
    for index in range(40):
        model.linear(1024, 1024 + index, 100, times=(0, 1, 2, 1)[index % 4])
    for part, copied in ((0.9, {0}), (0.75, {0}), (0.6, {0, 1}), (0.26, {0, 1}), (0.1, {0, 1, 2})):
        left_out = model.left_out(part * sum(model.sizes) + 1024 * 1100 * (part == 0.75),
                                  model.step)
        assert {(0, 1, 2, 1)[index % 4] for index in left_out} == copied


def test_what_is_chosen_is_the_most_that_hides_at_the_slowest_speed():
    chance = random.Random(0)
    for _ in range(40):
        sizes = [chance.randint(1, 20) for _ in range(9)]
        begins = [0, *itertools.accumulate(chance.choice((0, 1, 5, 30)) for _ in sizes[1:])]
        needed = chance.uniform(0.1, 0.7) * sum(sizes)

        def speed_for(chosen):
            """The slowest at which all copies hide."""
            times = (begins[index] - begins[before] for before, index in zip((0, *chosen), chosen))
            return max((sizes[index] / time if time else float("inf")
                        for index, time in zip(chosen, times)), default=0)

        enough = [chosen for count in range(10) for chosen in itertools.combinations(
            range(9), count) if sum(sizes[index] for index in chosen) >= needed]
        best, found = min(map(speed_for, enough)), overlappable(sizes, begins, needed)
        if best < FASTEST * needed / max(begins):
            assert sum(sizes[index] for index in found) >= needed
            assert speed_for(found) <= 1.001 * max(best, needed / max(begins))


def test_any_number_of_layers_that_stay_or_go_is_spread_over_the_model_before_a_step_is_known():
    for count in (8, 19, 57, 304):
        order = golden_ratio_order(count)
        for kept in range(count + 1):
            for part in (sorted(order[:kept]), sorted(order[kept:])):
                gaps = [after - before for before, after in itertools.pairwise(part)]
                assert max(gaps, default=0) <= 2 * count / max(1, len(part))


# --- what a step shows ---


class Small(torch.nn.Module):
    """Layers of which one runs twice, one for a single row, and one not at all; and a
    convolution."""

    def __init__(self):
        super().__init__()
        self.twice, self.row, self.never = (torch.nn.Linear(8, rows) for rows in (8, 4, 2))
        self.convolution = torch.nn.Conv2d(1, 3, 3, padding=1)
        for module in (self.twice, self.row, self.never, self.convolution):
            module.comfy_cast_weights = True

    def forward(self, input):
        of_row = self.row(self.twice(self.twice(input))[:1])
        return of_row.sum() + self.convolution(input[None, None]).sum()


def test_a_step_shows_how_often_layers_run_and_the_work_before_them():
    model = Small()
    counter = ProfileRecorder(model, torch.tensor([1.0]))
    model(torch.zeros(5, 8))
    step = counter.stop()
    assert [step.runs(name) for name in ("twice", "row", "never", "convolution")] == [2, 1, 0, 1]
    assert [step.work_before(name) for name in ("twice", "row", "convolution")] == [
        0, 2 * 5 * 64, 2 * 5 * 64 + 32]
    model(torch.zeros(5, 8))
    assert step.runs("twice") == 2


@pytest.mark.parametrize("part", ["", "twice"])
def test_where_most_is_compiled_a_step_shows_nothing(part):
    model = Small()
    model.get_submodule(part).compile(backend="eager")
    counter = ProfileRecorder(model, torch.tensor([1.0]))
    model(torch.zeros(5, 8))
    step = counter.stop()
    assert [step.runs(name) for name in ("twice", "row", "never")] == [1, 1, 1]
    assert step.work_before("row") == 0
    entries = [(0, 1 << 20, name, getattr(model, name), {}) for name in ("twice", "row", "never")]
    assert [layer_entry(entry).name for entry in residency_order(entries, 1 << 20, step)] == [
        layer_entry(entry).name for entry in residency_order(entries, 1 << 20, None)]
