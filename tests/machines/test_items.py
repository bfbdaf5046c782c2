"""What differs from item to item, how many workers there are, and what comes together: without Ray."""
import io
from unittest.mock import Mock

import numpy
import pytest
from devtools.files import demo_files
from featherweight.machines import here, pool, replica
from featherweight.machines.driver import pickled, read
from featherweight.machines.gathering import Gathering
from featherweight.machines.graph import GraphError
from featherweight.machines.items import items, varying
from featherweight.machines.place import MachineError
from featherweight.machines.replica import plan


def part(**nodes) -> dict:
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


SAMPLED = part(
    model=("Load", {"model_name": demo_files.MODELS["Q4_K"]}),
    good=("CLIPTextEncode", {"text": "a house"}), bad=("CLIPTextEncode", {"text": "a blur"}),
    control=("ControlNetApply", {"positive": ["good", 0], "negative": ["bad", 0]}),
    sampler=("KSampler", {"seed": 7, "model": ["model", 0], "positive": ["control", 0], "negative": ["control", 1]}),
    decode=("VAEDecode", {"samples": ["sampler", 0]}))


def test_seeds_count_up_and_begin_again_behind_the_largest():
    assert items(SAMPLED, 3) == [{"sampler.seed": 7 + index} for index in range(3)]
    noise = part(noise=("RandomNoise", {"noise_seed": (1 << 64) - 1}))
    assert items(noise, 2) == [{"noise.noise_seed": (1 << 64) - 1}, {"noise.noise_seed": 0}]


def test_a_seed_that_two_samplers_take_from_a_number_counts_up_once():
    linked = part(number=("PrimitiveInt", {"value": 5}), one=("KSampler", {"seed": ["number", 0]}),
                  two=("KSampler", {"seed": ["number", 0]}))
    assert items(linked, 2) == [{"number.value": 5}, {"number.value": 6}]
    assert varying(linked, items(linked, 2)) == {"number", "one", "two"}


def test_lines_go_to_the_prompt_and_never_to_the_negative_one():
    assert items(SAMPLED, 3, "a tree\n\n a palm \n") == [
        {"sampler.seed": 7, "good.text": "a tree"}, {"sampler.seed": 8, "good.text": "a palm"},
        {"sampler.seed": 9, "good.text": "a tree"}]
    shared = SAMPLED | part(control=("ControlNetApply", {"positive": ["good", 0], "negative": ["good", 0]}))
    del shared["bad"]
    assert items(shared, 1, "a tree")[0]["good.text"] == "a tree"


def test_lines_go_where_the_mark_is_if_it_is_anywhere():
    marked = SAMPLED | part(bad=("CLIPTextEncode", {"text": "no %text%, no %text%"}))
    assert items(marked, 1, "tree") == [{"sampler.seed": 7, "bad.text": "no tree, no tree"}]


@pytest.mark.parametrize("more, said", [
    (part(other=("CLIPTextEncode", {"text": "b"})), "2 nodes"), (part(good=("Load", {}), bad=("Load", {})), "no nodes")])
def test_lines_that_have_no_place_or_several_are_refused(more, said):
    with pytest.raises(GraphError, match=f"{said} before it have a prompt: write %text%"):
        items(SAMPLED | more, 2, "a tree")


def test_what_varies_is_what_the_changes_reach():
    assert varying(SAMPLED, items(SAMPLED, 2)) == {"sampler", "decode"}
    assert varying(SAMPLED, items(SAMPLED, 2, "a\nb")) == {"good", "control", "sampler", "decode"}
    assert varying(SAMPLED, items(SAMPLED, 1)) == set(SAMPLED)


@pytest.mark.parametrize("machines, workers, on_cpu, count, options", [
    ([{"CPU": 16, "GPU": 2}], 0, False, 2, {"ray_actor_options": {"num_gpus": 1, "num_cpus": 8}}),
    ([{"CPU": 16, "GPU": 2}, {"CPU": 6, "GPU": 1}, {"CPU": 64}], 0, False, 3,
     {"ray_actor_options": {"num_gpus": 1, "num_cpus": 6}}),
    ([{"CPU": 2, "GPU": 4}], 3, False, 3, {"ray_actor_options": {"num_gpus": 1, "num_cpus": 0.5}}),
    ([{"CPU": 16, "GPU": 2}], 0, True, 1, {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 16}}),
    ([{"CPU": 8}, {"CPU": 4}, {}], 0, False, 2, {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 4}}),
    ([{"CPU": 8}, {"CPU": 4}], 3, False, 3, {"max_replicas_per_node": 2, "ray_actor_options": {"num_cpus": 2}}),
    ([{}], 2, False, 0, {})])
def test_a_worker_for_each_gpu_or_else_for_each_machine(machines, workers, on_cpu, count, options):
    assert plan(machines, workers, on_cpu) == (count, options)


def test_workers_of_this_machine_have_its_arguments_without_the_servers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--listen", "--port", "8188", "--base-directory", "base", "--cuda-device", "1", "--lowvram", "--reserve-vram", "2",
             "--extra-model-paths-config", "a.yaml", "/b.yaml", "--extra-model-paths-config", "c.yaml",
             "--output-directory", "out", "--verbose", "DEBUG", "--fast", "fp16_accumulation"]
    assert here.for_workers(given) == [
        "--base-directory", str(tmp_path / "base"), "--extra-model-paths-config", str(tmp_path / "a.yaml"), "/b.yaml",
        str(tmp_path / "c.yaml"), "--lowvram", "--reserve-vram", "2", "--fast", "fp16_accumulation"]


def picture(width=4, height=2, count=1):
    return numpy.zeros((count, height, width, 3), numpy.float32)


def test_the_bar_counts_the_steps_of_all_items():
    gathering = Gathering(3, {"sampler"})
    gathering.tell((0, "begins"), "desk")
    gathering.tell((0, "progress"), ("model", 300, 600))  # loading, which the others need not do
    gathering.tell((0, "progress"), ("sampler", 1, 10))
    assert gathering.progress() == (1, 30)
    gathering.tell((1, "progress"), ("sampler", 4, 10))
    gathering.tell((0, "images"), picture())
    assert gathering.progress() == (14, 30)
    gathering.tell((1, "lost"), None)
    assert gathering.progress() == (10, 30)
    assert gathering.text() == "1 of 3 done, 0 in work\non desk"


def test_pictures_of_other_sizes_are_refused_in_a_sentence_and_batches_are_not():
    gathering = Gathering(3, ())
    gathering.tell((1, "images"), picture())
    gathering.tell((0, "images"), picture(count=2))
    with pytest.raises(GraphError, match="Item 3 of 3 is 5 x 2, item 2 is 4 x 2: pictures of one run have one size"):
        gathering.tell((2, "images"), picture(width=5))


@pytest.mark.parametrize("kind, data, error, said", [
    ("failed", "node 7 (KSampler) has no such sampler.", GraphError, "Item 2 of 3 failed: node 7"),
    ("unfit", "attic: has no file 'x.gguf'.", MachineError, "Item 2 of 3 cannot be drawn on attic: has no file")])
def test_what_an_item_or_a_machine_lacks_is_said_with_its_name(kind, data, error, said):
    with pytest.raises(error, match=said):
        Gathering(3, ()).tell((1, kind), data)


def test_a_message_that_is_cut_off_is_none():
    data = pickled((1, "run", {"a": b"x" * 1000}))
    assert read(io.BytesIO(data)) == (1, "run", {"a": b"x" * 1000})
    assert [read(io.BytesIO(data[:length])) for length in (0, 5, 8, 500)] == [None] * 4


def test_a_driver_that_ends_is_said_and_the_next_run_has_another(monkeypatch):
    """As when the head of its cluster goes: the process that holds the connection ends, and this one does not."""
    pytest.importorskip("ray")
    monkeypatch.setattr(pool, "START", "import sys; sys.stdin.buffer.read()")  # one that never answers
    drivers, ended = pool.Pool(), []

    def end():
        ended.append(drivers.drivers["auto"].process)
        ended[-1].kill()

    for _ in range(2):
        with pytest.raises(MachineError, match="The connection to Ray at auto ended"):
            drivers.run("auto", {}, lambda *_: None, end)
    assert len({process.pid for process in ended}) == 2


def test_what_is_cancelled_is_told_to_the_driver(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(pool, "START", "import sys; sys.stdin.buffer.read()")
    drivers, sent = pool.Pool(), []
    monkeypatch.setattr(pool.Process, "send", lambda self, message: sent.append(message))

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drivers.run("auto", {"graphs": []}, lambda *_: None, interrupted)
    assert sent == [("run", 0, {"graphs": []}), ("cancel", 0)]
    drivers.drivers["auto"].process.kill()


@pytest.mark.parametrize("kind, attempts", [("ActorAlreadyExistsError", 3), (None, 1)])
def test_serve_that_another_editor_starts_is_waited_for_and_another_mistake_is_not(kind, attempts, monkeypatch):
    exceptions = pytest.importorskip("ray.exceptions")
    error = getattr(exceptions, kind)("SERVE_CONTROLLER_ACTOR") if kind else ValueError("num_cpus must be positive")
    monkeypatch.setattr(replica, "STARTS", 3)
    monkeypatch.setattr(replica, "RETRY", 0)
    serve = Mock()
    serve.start.side_effect = error
    with pytest.raises(type(error)):
        replica._start(serve)
    assert serve.start.call_count == attempts
